"""An OpenAI-compatible server in a thread that echoes prompts, and misbehaves when asked to."""

import asyncio
import contextlib
import json
import threading

from aiohttp import web


class FakeServer:
    """Answers `max_tokens` bytes of the prompt, one event each. Prompts say what goes wrong:
    "refuse" is 429, "break" ends early, "error" is an error event, "garbage" is no JSON."""

    def __init__(self):
        self.bodies: list[dict] = []

    async def models(self, http: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": "fake"}]})

    async def complete(self, http: web.Request) -> web.StreamResponse:
        body = await http.json()
        self.bodies.append(body)
        prompt = body["prompt"]
        if prompt == "refuse":
            return web.json_response({"error": {"message": "too many"}}, status=429)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(http)
        text = (prompt * body["max_tokens"])[: body["max_tokens"]]
        for number, char in enumerate(text):
            if prompt == "break" and number == 2:
                return response
            finish = "length" if number == len(text) - 1 else None
            await self._send(response, {"choices": [{"text": char, "finish_reason": finish}]})
        if prompt == "error":
            await self._send(response, {"error": {"message": "it broke"}})
        if prompt == "garbage":
            await response.write(b"data: {no json\n\n")
        usage = {"prompt_tokens": len(prompt), "completion_tokens": len(text)}
        await self._send(response, {"choices": [], "usage": usage})
        await response.write(b"data: [DONE]\n\n")
        return response

    async def _send(self, response: web.StreamResponse, event: dict) -> None:
        await response.write(f"data: {json.dumps(event)}\n\n".encode())


@contextlib.contextmanager
def fake_server():
    """Yields (url, FakeServer)."""
    server, loop = FakeServer(), asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    async def begin() -> web.AppRunner:
        app = web.Application()
        app.router.add_get("/v1/models", server.models)
        app.router.add_post("/v1/completions", server.complete)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        return runner

    runner = asyncio.run_coroutine_threadsafe(begin(), loop).result(10)
    host, port = runner.addresses[0]
    try:
        yield f"http://{host}:{port}", server
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(5)
