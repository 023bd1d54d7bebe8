"""The HTTP API, over a loopback socket, in front of a service that follows a script."""

import asyncio
import contextlib
import dataclasses
import functools
import itertools
import json
import socket
import threading

import pytest
from aiohttp import ClientTimeout
from aiohttp.test_utils import TestClient, TestServer

from eep_jax.coordination.scaling import ScaleRequest
from eep_jax.errors import CoverageLost, InvalidMove
from eep_jax.runtime.http.app import build_app
from eep_jax.runtime.http.completion import CompletionLimits
from eep_jax.runtime.serving.contract import StreamProgress
from eep_jax.runtime.text.chat_template import ChatTemplate
from eep_jax.runtime.text.tokenizer import ByteTokenizer, PieceDecoder
from tests.support.fake_service import CREATED_S, FakeService, down_service, full_service, spell

LIMITS = CompletionLimits(model="org/tiny", context_tokens=1024)
DEADLINE_S = 10.0
PATH, CHAT = "/v1/completions", "/v1/chat/completions"
TEMPLATE = ChatTemplate("{{ messages[0].content }}->", {})


@contextlib.asynccontextmanager
async def serving(service: FakeService, limits: CompletionLimits = LIMITS, **options):
    server = TestServer(build_app(service, limits, **options))  # cancels handlers, as Listeners do
    async with TestClient(server, timeout=ClientTimeout(total=DEADLINE_S)) as client:
        yield client


def story(coroutine_function):
    """Runs an async test under a deadline."""

    @functools.wraps(coroutine_function)
    def test(self, *args, **kwargs):
        asyncio.run(asyncio.wait_for(coroutine_function(self, *args, **kwargs), DEADLINE_S))

    return test


def body(**fields) -> dict:
    return {"model": "org/tiny", "prompt": "Hi"} | fields


async def events(response) -> list:
    """The data of every event; "[DONE]" as a string."""
    text = (await response.read()).decode()
    assert text.endswith("\n\n")
    datas = [event.removeprefix("data: ") for event in text.removesuffix("\n\n").split("\n\n")]
    return [data if data == "[DONE]" else json.loads(data) for data in datas]


async def refusal(response, status: int, code: str | None) -> dict:
    assert response.status == status
    assert response.content_type == "application/json"
    error = (await response.json())["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["code"] == code
    return error


class TestWholeAnswer:
    @story
    async def test_it_has_the_form_of_openai(self):
        async with serving(FakeService(spell("héllo"))) as client:
            response = await client.post(PATH, json=body())
            assert response.status == 200
            assert await response.json() == {
                "id": "cmpl-r0",
                "object": "text_completion",
                "created": CREATED_S,
                "model": "org/tiny",
                "choices": [
                    {"index": 0, "text": "héllo", "logprobs": None, "finish_reason": "length"}
                ],
                "usage": {"prompt_tokens": 3, "completion_tokens": 6, "total_tokens": 9},
            }

    @story
    async def test_a_stop_string_ends_the_text_and_the_request(self):
        service = FakeService(
            [StreamProgress(tokens=tuple(b"one EN")), StreamProgress(tokens=tuple(b"D two"))]
        )
        async with serving(service) as client:
            answer = await (await client.post(PATH, json=body(stop="END"))).json()
        assert answer["choices"][0]["text"] == "one "
        assert answer["choices"][0]["finish_reason"] == "stop"
        assert answer["usage"]["completion_tokens"] == 7
        assert service.streams[0].cancelled.is_set()

    @story
    async def test_a_request_cancelled_at_its_stop_string_reads_the_same_again(self):
        service = FakeService(
            [StreamProgress(tokens=tuple(b"one END tw"), error="it was cancelled")]
        )
        async with serving(service) as client:
            answer = await (await client.post(PATH, json=body(stop="END"))).json()
        assert answer["choices"][0]["text"] == "one "
        assert answer["choices"][0]["finish_reason"] == "stop"

    @story
    async def test_the_end_of_text_is_a_stop(self):
        async with serving(FakeService(spell("amen", "stop"))) as client:
            answer = await (await client.post(PATH, json=body())).json()
        assert answer["choices"][0]["finish_reason"] == "stop"

    @story
    async def test_dropped_experts_are_named(self):
        steps = [
            StreamProgress(tokens=(65,), degraded=(9, 3)),
            StreamProgress(tokens=(66,), degraded=(3,)),
        ]
        async with serving(FakeService([*steps, StreamProgress(finish_reason="length")])) as client:
            answer = await (await client.post(PATH, json=body())).json()
        assert answer["degraded"] == {"experts": [3, 9]}

    @story
    async def test_several_choices_are_one_answer(self):
        service = FakeService(spell("abc"))
        async with serving(service) as client:
            sent = body(prompt=["Hi", "Hello"], n=2, echo=True)
            answer = await (await client.post(PATH, json=sent)).json()
        assert [c["text"] for c in answer["choices"]] == ["Hiabc"] * 2 + ["Helloabc"] * 2
        assert [c["index"] for c in answer["choices"]] == [0, 1, 2, 3]
        assert answer["usage"] == {
            "prompt_tokens": 3 + 6,
            "completion_tokens": 12,
            "total_tokens": 21,
        }

    @story
    async def test_one_failed_choice_ends_all(self):
        service = FakeService()
        service.scripts = [[asyncio.Event()], [StreamProgress(error="it is lost")]]
        async with serving(service) as client:
            response = await client.post(PATH, json=body(n=2))
            await refusal(response, 500, "generation_failed")
        assert service.streams[0].cancelled.is_set()

    @pytest.mark.parametrize(
        ("script", "code"),
        [
            ([StreamProgress(error="experts (3,) are lost")], "generation_failed"),
            ([StreamProgress(tokens=(65,))], "generation_failed"),
            ([RuntimeError("secret")], "internal_error"),
        ],
    )
    @story
    async def test_a_failure_is_a_500(self, script, code):
        async with serving(FakeService(script)) as client:
            error = await refusal(await client.post(PATH, json=body()), 500, code)
        assert error["type"] == "server_error" and "secret" not in error["message"]

    @story
    async def test_any_content_type_will_do_if_the_body_is_json(self):
        async with serving(FakeService(spell("x"))) as client:
            headers = {"Content-Type": "text/plain"}
            response = await client.post(PATH, data=json.dumps(body()), headers=headers)
            assert response.status == 200


class TestEvents:
    @story
    async def test_choices_come_as_they_grow_each_with_its_end(self):
        slow, service = asyncio.Event(), FakeService()
        service.scripts = [[slow, *spell("ab")], spell("xy")]
        usage = {"include_usage": True}
        sent = {"model": "org/tiny", "messages": [{"role": "user", "content": "Hi"}], "n": 2}
        sent |= {"stream": True, "stream_options": usage}
        async with serving(service, template=TEMPLATE) as client:
            response = await client.post(CHAT, json=sent)
            await service.submitting.wait()
            slow.set()
            *found, last, done = await events(response)
        assert done == "[DONE]" and last["choices"] == []
        assert last["usage"]["completion_tokens"] == 4
        texts, ends = {0: "", 1: ""}, {}
        for event in found:
            (choice,) = event["choices"]
            texts[choice["index"]] += choice["delta"].get("content", "")
            assert event["id"] == found[0]["id"] and choice["index"] not in ends
            if choice["finish_reason"]:
                ends[choice["index"]] = choice["finish_reason"]
        assert texts == {0: "ab", 1: "xy"} and ends == {0: "length", 1: "length"}

    @story
    async def test_the_last_chunk_has_the_finish_reason_and_done_follows(self):
        async with serving(FakeService(spell("a€"))) as client:
            response = await client.post(PATH, json=body(stream=True))
            assert response.content_type == "text/event-stream"
            *chunks, done = await events(response)
        assert done == "[DONE]"
        choices = [chunk["choices"][0] for chunk in chunks]
        assert [(c["text"], c["finish_reason"]) for c in choices] == [("a", None), ("€", "length")]
        assert {chunk["id"] for chunk in chunks} == {"cmpl-r0"}
        assert all("usage" not in chunk for chunk in chunks)

    @story
    async def test_usage_comes_in_a_chunk_of_its_own(self):
        sent = body(stream=True, stream_options={"include_usage": True})
        async with serving(FakeService(spell("ab"))) as client:
            *chunks, usage, _ = await events(await client.post(PATH, json=sent))
        assert [chunk["usage"] for chunk in chunks] == [None, None]
        assert usage["choices"] == []
        expected = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
        assert usage["usage"] == expected

    @story
    async def test_every_increment_arrives_before_the_next_is_made(self):
        gates = [asyncio.Event() for _ in range(3)]
        steps = spell("abc")
        script = [steps[0], gates[0], steps[1], gates[1], steps[2]]
        async with serving(FakeService(script)) as client:
            response = await client.post(PATH, json=body(stream=True))
            for letter, gate in zip("abc", gates, strict=True):
                line = await response.content.readuntil(b"\n\n")
                assert json.loads(line.removeprefix(b"data: "))["choices"][0]["text"] == letter
                gate.set()

    @story
    async def test_no_part_of_a_stop_string_is_sent(self):
        service = FakeService(spell("one END two"))
        async with serving(service) as client:
            *chunks, _ = await events(await client.post(PATH, json=body(stream=True, stop="END")))
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "one "
        assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
        assert service.streams[0].cancelled.is_set()

    @pytest.mark.parametrize(
        "end", [StreamProgress(error="experts (3,) are lost"), RuntimeError("x")]
    )
    @story
    async def test_a_failure_is_the_last_event(self, end):
        async with serving(FakeService([StreamProgress(tokens=(65,)), end])) as client:
            response = await client.post(PATH, json=body(stream=True))
            first, last = await events(response)
        assert first["choices"][0]["text"] == "A"
        assert last["error"]["type"] == "server_error"

    @story
    async def test_a_refused_stream_has_a_status(self):
        async with serving(full_service()) as client:
            response = await client.post(PATH, json=body(stream=True))
            await refusal(response, 429, "queue_full")

    @story
    async def test_a_client_that_does_not_read_stops_the_reading_and_is_dropped(self):
        # Each of these tokens is many invalid bytes, of which JSON spells each in six: "\\ufffd".
        endless = (StreamProgress(tokens=(255,)) for _ in itertools.count())
        service = FakeService(endless)
        limits = dataclasses.replace(LIMITS, tokenizer=LongTokenizer())
        async with serving(service, limits, write_deadline_s=0.5) as client:
            with raw_request(client, body(stream=True)):
                await service.submitting.wait()
                await service.streams[0].cancelled.wait()
                stuck_bytes = service.streams[0].num_read * 60_000
        # What was read fits the buffers of two sockets, which the kernel limits.
        assert stuck_bytes < 32 << 20


def raw_request(client: TestClient, sent: dict, headers: str = "") -> socket.socket:
    """Posts and never reads: a plain socket with a small buffer."""
    data = json.dumps(sent)
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect((client.host, client.port))
    head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\n{headers}Content-Length: {len(data)}\r\n\r\n"
    connection.sendall((head + data).encode())
    return connection


def chat(**fields) -> dict:
    return {"model": "org/tiny", "messages": [{"role": "user", "content": "Hi"}]} | fields


class TestChat:
    @story
    async def test_the_answer_has_the_form_of_openai(self):
        async with serving(FakeService(spell("héllo")), template=TEMPLATE) as client:
            answer = await (await client.post(CHAT, json=chat())).json()
        assert answer == {
            "id": "chatcmpl-r0",
            "object": "chat.completion",
            "created": CREATED_S,
            "model": "org/tiny",
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": "héllo", "refusal": None},
                    "logprobs": None,
                    "finish_reason": "length",
                }
            ],
            "usage": {"prompt_tokens": 4, "completion_tokens": 6, "total_tokens": 10},
        }

    @story
    async def test_a_stream_names_the_speaker_then_the_text_then_the_end(self):
        sent = chat(stream=True, stream_options={"include_usage": True}, stop="!")
        async with serving(FakeService(spell("a€!b", "stop")), template=TEMPLATE) as client:
            *chunks, usage, done = await events(await client.post(CHAT, json=sent))
        assert done == "[DONE]"
        assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
        deltas = [(c["choices"][0]["delta"], c["choices"][0]["finish_reason"]) for c in chunks]
        assert deltas == [
            ({"role": "assistant", "content": ""}, None),
            ({"content": "a"}, None),
            ({"content": "€"}, None),
            ({}, "stop"),
        ]
        assert usage["choices"] == [] and usage["usage"]["completion_tokens"] == 5

    @story
    async def test_the_rendered_conversation_is_the_prompt(self):
        service = FakeService(spell("x"))
        async with serving(service, template=TEMPLATE) as client:
            await client.post(CHAT, json=chat(temperature=0), headers={"Idempotency-Key": "k"})
        ((request, key),) = service.submitted
        assert (bytes(request.prompt), key, request.temperature) == (b"Hi->", "k", 0.0)

    @story
    async def test_refusals(self):
        async with serving(FakeService()) as client:
            error = await refusal(await client.post(CHAT, json=chat()), 400, "no_chat_template")
            assert error["param"] == "messages"
        async with serving(FakeService(), template=TEMPLATE) as client:
            error = await refusal(await client.post(CHAT, json=chat(tools=[1])), 400, None)
            assert error["param"] == "tools"
            await refusal(await client.post(CHAT, data=b"{"), 400, None)


class LongTokenizer(ByteTokenizer):
    """A tokenizer each token of which stands for 10,000 bytes."""

    def decoder(self, after: tuple[int, ...] = ()) -> PieceDecoder:
        return PieceDecoder(lambda token: bytes((token,)) * 10_000)


class HeldTokenizer(ByteTokenizer):
    """A tokenizer that takes until it is released."""

    def __init__(self):
        super().__init__()
        self.begun, self.release = threading.Event(), threading.Event()

    def encode(self, text: str) -> tuple[int, ...]:
        self.begun.set()
        assert self.release.wait(DEADLINE_S)
        return super().encode(text)


class TestDisconnect:
    @pytest.mark.parametrize("stream", [False, True])
    @pytest.mark.parametrize("begun", [False, True])
    @story
    async def test_it_cancels_the_request_once(self, stream, begun):
        never = asyncio.Event()
        service = FakeService([StreamProgress(tokens=(65,)), never] if begun else [never])
        async with serving(service) as client:
            with raw_request(client, body(stream=stream)):
                await service.submitting.wait()
            await service.streams[0].cancelled.wait()
        assert service.streams[0].num_cancelled == 1

    @pytest.mark.parametrize("stream", [False, True])
    @story
    async def test_a_request_with_a_key_goes_on(self, stream):
        gate = asyncio.Event()
        service = FakeService([StreamProgress(tokens=(65,)), gate, *spell("men", "stop")])
        async with serving(service) as client:
            with raw_request(client, body(stream=stream), "Idempotency-Key: k\r\n"):
                await service.submitting.wait()
            await no_connections(client)
            assert not service.streams[0].cancelled.is_set()
            gate.set()
            again = await client.post(
                PATH, json=body(stream=stream), headers={"Idempotency-Key": "k"}
            )
            assert again.status == 200
        assert [key for _, key in service.submitted] == ["k", "k"]
        assert not service.streams[0].cancelled.is_set()

    @story
    async def test_while_its_body_is_read_submits_nothing(self):
        service, tokenizer = FakeService(spell("amen", "stop")), HeldTokenizer()
        limits = dataclasses.replace(LIMITS, tokenizer=tokenizer)
        async with serving(service, limits) as client:
            with raw_request(client, body()):
                await asyncio.to_thread(tokenizer.begun.wait, DEADLINE_S)
            await no_connections(client)
            tokenizer.release.set()
            assert (await client.post(PATH, json=body())).status == 200
        assert len(service.submitted) == 1
        assert not service.streams[0].cancelled.is_set()

    @story
    async def test_while_its_body_arrives_submits_nothing(self):
        service = FakeService(spell("amen", "stop"))
        async with serving(service) as client:
            with socket.create_connection((client.host, client.port)) as connection:
                connection.sendall(
                    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{"
                )
                while not client.server.runner.server.connections:
                    await asyncio.sleep(0.01)
            await no_connections(client)
        assert not service.submitted


async def no_connections(client: TestClient) -> None:
    """Waits until the server has seen all its clients leave."""
    while client.server.runner.server.connections:
        await asyncio.sleep(0.01)


class TestRefusals:
    @pytest.mark.parametrize(
        "data", [b"", b"{", b"\xff", b'{"a": NaN}', b"[" * 100_000, b"1" * 5000]
    )
    @story
    async def test_what_is_not_json(self, data):
        async with serving(FakeService()) as client:
            await refusal(await client.post(PATH, data=data), 400, None)

    @story
    async def test_what_is_not_an_object(self):
        async with serving(FakeService()) as client:
            await refusal(await client.post(PATH, json=[]), 400, None)

    @story
    async def test_a_wrong_field_is_named(self):
        async with serving(FakeService()) as client:
            error = await refusal(await client.post(PATH, json=body(max_tokens=0)), 400, None)
            assert error["param"] == "max_tokens"
            assert error["type"] == "invalid_request_error"
            await refusal(await client.post(PATH, json=body(model="x")), 404, "model_not_found")

    @story
    async def test_a_body_that_is_too_large(self):
        async with serving(FakeService(), body_bytes_max=100) as client:
            response = await client.post(PATH, json=body(prompt="x" * 100))
            error = await refusal(response, 413, "body_too_large")
            assert "100 bytes" in error["message"]

    @story
    async def test_a_body_whose_encoding_is_a_lie(self):
        async with serving(FakeService()) as client:
            headers = {"Content-Encoding": "deflate"}
            response = await client.post(PATH, data=b"not deflated", headers=headers)
            await refusal(response, 400, None)

    @story
    async def test_unknown_paths_and_wrong_methods(self):
        async with serving(FakeService()) as client:
            await refusal(await client.get("/v1/chats"), 404, "unknown_url")
            response = await client.get(PATH)
            await refusal(response, 405, "method_not_allowed")
            assert response.headers["Allow"] == "POST"

    @pytest.mark.parametrize(
        ("service", "status", "code"),
        [(full_service, 429, "queue_full"), (down_service, 503, "service_unavailable")],
    )
    @story
    async def test_a_service_that_cannot_take_more_says_when_to_return(self, service, status, code):
        async with serving(service()) as client:
            response = await client.post(PATH, json=body())
            await refusal(response, status, code)
            assert int(response.headers["Retry-After"]) >= 1

    @pytest.mark.parametrize("key", ["", "k" * 129, "é", "a\tb"])
    @story
    async def test_a_key_that_is_not_short_and_printable(self, key):
        async with serving(FakeService(spell("x"))) as client:
            response = await client.post(PATH, json=body(), headers={"Idempotency-Key": key})
            error = await refusal(response, 400, None)
            assert error["param"] == "Idempotency-Key"

    @story
    async def test_the_same_key_with_another_body(self):
        headers = {"Idempotency-Key": "k" * 128}
        async with serving(FakeService(spell("x"))) as client:
            assert (await client.post(PATH, json=body(), headers=headers)).status == 200
            assert (await client.post(PATH, json=body(), headers=headers)).status == 200
            response = await client.post(PATH, json=body(seed=1), headers=headers)
            await refusal(response, 409, "idempotency_key_conflict")


class TestOtherRoutes:
    @story
    async def test_models(self):
        async with serving(FakeService()) as client:
            (model,) = (await (await client.get("/v1/models")).json())["data"]
            assert (model["id"], model["object"]) == ("org/tiny", "model")
            assert await (await client.get("/v1/models/org/tiny")).json() == model
            assert await (await client.get("/v1/models/org%2Ftiny")).json() == model
            await refusal(await client.get("/v1/models/x"), 404, "model_not_found")

    @story
    async def test_a_wish_that_cannot_be_granted_says_why(self):
        path, sent = "/v1/fault_tolerance/apply", {"action": "scale_up", "count": 1}
        for error, code in ((InvalidMove, "invalid_move"), (CoverageLost, "coverage_lost")):
            async with serving(FakeService(refusal=error("rank 3 is in"))) as client:
                await refusal(await client.post(path, json=sent), 409, code)
                await refusal(await client.post(path, json={"action": "melt"}), 400, None)

    @story
    async def test_health_status_and_metrics(self):
        service = FakeService()
        async with serving(service) as client:
            response = await client.get("/health")
            assert (response.status, await response.json()) == (200, {"active_ranks": 3})
            service.healthy = False
            assert (await client.get("/health")).status == 503
            response = await client.get("/v1/fault_tolerance/status")
            assert await response.json() == {"epoch": 7}
            sent = {"action": "scale_down", "ranks": [1]}
            response = await client.post("/v1/fault_tolerance/apply", json=sent)
            assert (response.status, await response.json()) == (200, {"epoch_planned": 8})
            assert service.scale_requests == [ScaleRequest(action="scale_down", ranks=(1,))]
            response = await client.get("/metrics")
            assert response.content_type == "text/plain"
            assert b"eep_epoch 7.0" in await response.read()
