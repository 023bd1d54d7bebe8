"""HTTP front of a static service, and its reaction to the death of a rank.

`restart`: all processes end and start again. `rejit`: the front sends the death to the survivors,
which go on by themselves. Either way the requests of lost ranks are lost: no other rank has their
cache, and a static service keeps no record of them. New requests wait meanwhile, none is refused.
"""

import asyncio
import codecs
import dataclasses
import itertools
import json
import pathlib
import subprocess
import threading
import time

from aiohttp import web

from benchmarks.processes import Machine, free_port, start_worker, tail, write_job
from eep_jax.config import RunConfig
from launch import flags

END_DEADLINE_S = 20.0


@dataclasses.dataclass(eq=False)
class _Entry:
    """A request that is being answered."""

    request: dict
    rank: int | None = None
    sent: int = 0  # tokens that went to the client
    news: asyncio.Queue = dataclasses.field(default_factory=asyncio.Queue)


class StaticService:
    """Ranks of one mesh behind `POST /v1/completions`. Use from one event loop."""

    def __init__(
        self,
        config: RunConfig,
        machine: Machine,
        recovery: str,
        exchange: str,
        directory: pathlib.Path,
    ):
        self.config, self._machine = config, machine
        self.recovery, self._exchange, self._directory = recovery, exchange, directory
        self._numbers = itertools.count()
        self._entries: dict[str, _Entry] = {}
        self._ranks: dict[int, object] = {}
        self._ready: dict[int, tuple[int, ...]] = {}  # rank -> ranks it is compiled for
        self._generation = 0
        self.serving = asyncio.Event()
        self.events: list[tuple[str, float]] = []  # (detected or resumed, monotonic s)
        self.url = ""

    async def __aenter__(self) -> "StaticService":
        self._loop = asyncio.get_running_loop()
        app = web.Application()
        app.router.add_post("/v1/completions", self._complete)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1, access_log=None)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        host, port = self._runner.addresses[0]
        self.url = f"http://{host}:{port}"
        self._start()
        return self

    async def __aexit__(self, *_) -> None:
        self._end()
        await self._runner.cleanup()

    def kill(self, rank: int) -> float:
        """SIGKILL; returns the monotonic seconds at which it was sent."""
        now_s = time.monotonic()
        self._ranks[rank].kill()
        return now_s

    def log_tail(self) -> str:
        """The last lines of every rank's log."""
        return "\n".join(tail(log, 6) for log in sorted(self._directory.glob("rank*.log")))

    # Processes.

    def _start(self) -> None:
        self._generation += 1
        self._ready = {}
        job = {"flags": flags.forwarded(), "coordinator": f"127.0.0.1:{free_port()}"}
        job |= {"exchange": self._exchange, "recovery": self.recovery}
        write_job(self._directory, self._machine, 0.0, job)
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        fraction = self.config.device.memory_fraction
        for rank in range(self._machine.ranks):
            process = start_worker(
                "benchmarks.static.server_rank",
                self._machine,
                rank,
                self._directory,
                fraction=fraction,
                **pipes,
            )
            self._ranks[rank] = process
            reading = (self._generation, rank, process.stdout)
            threading.Thread(target=self._read, args=reading, daemon=True).start()

    def _end(self) -> None:
        self._generation += 1
        for process in self._ranks.values():
            process.kill()
        for process in self._ranks.values():
            process.wait(END_DEADLINE_S)
        self._ranks.clear()

    def _read(self, generation: int, rank: int, lines) -> None:
        """Passes on a rank's lines, and its end: the pipe of a killed process closes at once."""
        for line in lines:
            self._loop.call_soon_threadsafe(self._take, generation, rank, json.loads(line))
        self._loop.call_soon_threadsafe(self._died, generation, rank)

    def _died(self, generation: int, rank: int) -> None:
        if generation != self._generation:
            return
        self.events.append(("detected", time.monotonic()))
        self.serving.clear()
        process = self._ranks.pop(rank)
        process.kill()
        process.wait(END_DEADLINE_S)
        if self.recovery == "restart":
            self._lose(self._entries.values(), "the service is restarted")
            self._end()
            self._start()
            return
        self._lose([e for e in self._entries.values() if e.rank == rank], f"rank {rank} died")
        self._ready = {}
        for survivor in self._ranks:
            self._send(survivor, {"dead": rank})

    def _send(self, rank: int, message: dict) -> None:
        try:
            self._ranks[rank].stdin.write(json.dumps(message).encode() + b"\n")
            self._ranks[rank].stdin.flush()
        except OSError:
            return  # the rank ended; `_read` notices

    def _lose(self, entries, why: str) -> None:
        for entry in [e for e in entries if e.rank is not None]:
            entry.news.put_nowait(ConnectionError(why))

    # Requests.

    def _take(self, generation: int, rank: int, message: dict) -> None:
        if generation != self._generation:
            return
        if "ready" in message:
            self._ready[rank] = tuple(message["ready"])
            alive = tuple(sorted(self._ranks))
            if all(self._ready.get(r) == alive for r in alive):
                self.events.append(("resumed", time.monotonic()))
                self.serving.set()
                for name, entry in self._entries.items():
                    if entry.rank is None:
                        self._assign(name, entry)
            return
        for name, first, tokens, finish in message["progress"]:
            if (entry := self._entries.get(name)) is not None:
                new = tokens[max(0, entry.sent - first) :]
                entry.sent += len(new)
                entry.news.put_nowait((new, finish))

    def _assign(self, name: str, entry: _Entry) -> None:
        busy = lambda rank: sum(e.rank == rank for e in self._entries.values())
        entry.rank = min(self._ranks, key=busy)
        self._send(entry.rank, {"add": entry.request})

    async def _complete(self, http: web.Request) -> web.StreamResponse:
        body = await http.json()
        name, prompt = f"r{next(self._numbers)}", body["prompt"].encode()
        entry = _Entry(
            {
                "id": name,
                "prompt": [self.config.model.bos_token, *prompt],
                "max_tokens": body["max_tokens"],
                "temperature": body["temperature"],
                "top_p": body.get("top_p", 1.0),
                "seed": body.get("seed", 0),
            }
        )
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(http)
        self._entries[name] = entry
        try:
            if self.serving.is_set():
                self._assign(name, entry)
            await self._stream(response, entry)
        except ConnectionError as error:
            await _event(response, {"error": {"message": str(error)}})
        finally:
            del self._entries[name]
        return response

    async def _stream(self, response: web.StreamResponse, entry: _Entry) -> None:
        decoder, finish = codecs.getincrementaldecoder("utf-8")("replace"), ""
        while not finish:
            news = await entry.news.get()
            if isinstance(news, ConnectionError):
                raise news
            tokens, finish = news
            text = decoder.decode(bytes(tokens), final=bool(finish))
            choice = {"text": text, "finish_reason": finish or None}
            await _event(response, {"choices": [choice]})
        usage = {
            "prompt_tokens": len(entry.request["prompt"]),
            "completion_tokens": entry.sent,
        }
        await _event(response, {"choices": [], "usage": usage})
        await response.write(b"data: [DONE]\n\n")


async def _event(response: web.StreamResponse, event: dict) -> None:
    await response.write(f"data: {json.dumps(event)}\n\n".encode())
