"""A model as Hugging Face has it, converted, served as a conversation by ranks that die."""

import asyncio
import json

import aiohttp
import pytest

from eep_jax.storage.conversion import Conversion
from eep_jax.storage.hugging_face import HuggingFaceCheckpoint
from tests.support.hf_directories import write_chat_model
from tests.support.processes import ClusterUnderTest, is_out

pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(400)]

MODEL, TOKENS = "tiny-chat", 300
LAYOUT = ("cluster.ranks=3", "cluster.slots_per_rank=4", "cluster.redundancy=1")


def chat(number: int, **more) -> dict:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": f"Größe {number} 😀?"},
    ]
    common = {"model": MODEL, "messages": messages, "max_completion_tokens": TOKENS}
    drawn = {"temperature": 1.0, "seed": number} if number % 2 else {"temperature": 0}
    return common | drawn | more


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    root = tmp_path_factory.mktemp("model")
    hf = write_chat_model(root / MODEL)
    for _ in Conversion(HuggingFaceCheckpoint(hf), root / "out").run():
        pass
    return root / "out"


async def whole(url: str, body: dict) -> dict:
    timeout = aiohttp.ClientTimeout(total=120)
    async with (
        aiohttp.ClientSession(timeout=timeout) as session,
        session.post(url + "/v1/chat/completions", json=body) as answer,
    ):
        assert answer.status == 200, await answer.text()
        return await answer.json()


async def streamed(url: str, body: dict, begun: asyncio.Event) -> tuple[str, str, dict]:
    """(text, finish reason, usage); `begun` is set at the third increment."""
    timeout = aiohttp.ClientTimeout(total=120)
    text, reason, usage, number = "", None, None, 0
    more = {"stream": True, "stream_options": {"include_usage": True}}
    async with (
        aiohttp.ClientSession(timeout=timeout) as session,
        session.post(url + "/v1/chat/completions", json=body | more) as answer,
    ):
        async for line in answer.content:
            data = line.decode().removeprefix("data: ").strip()
            if not data or data == "[DONE]":
                continue
            chunk = json.loads(data)
            for choice in chunk.get("choices", ()):
                text += choice["delta"].get("content", "")
                reason = choice["finish_reason"] or reason
            usage, number = chunk.get("usage") or usage, number + 1
            if number == 3:
                begun.set()
    begun.set()  # however short it was
    return text, reason, usage


async def while_one_dies(url: str, bodies: list[dict], kill) -> list[tuple[str, str, dict]]:
    begun = [asyncio.Event() for _ in bodies]
    streams = [streamed(url, b, e) for b, e in zip(bodies, begun, strict=True)]
    tasks = [asyncio.create_task(stream) for stream in streams]
    for event in begun:
        await event.wait()
    kill()
    return await asyncio.gather(*tasks)


def test_conversations_go_on_with_the_same_text_when_a_rank_dies(checkpoint, tmp_path):
    arguments = [f"--checkpoint={checkpoint}"]
    with ClusterUnderTest(
        tmp_path, *LAYOUT, arguments=arguments, ranks=3, truth=False, respawn_delay_ms=-1
    ) as cluster:
        url, bodies = cluster.cluster.url, [chat(n) for n in range(6)]
        truth = [cluster.run(whole(url, body)) for body in bodies]
        found = cluster.run(while_one_dies(url, bodies, lambda: cluster.signal(1)))
        status = cluster.wait(is_out(1), "the repair")
        for answer, (text, reason, usage) in zip(truth, found, strict=True):
            (choice,) = answer["choices"]
            assert (text, reason) == (choice["message"]["content"], choice["finish_reason"])
            assert usage == answer["usage"] and text
        assert status["requests"]["requeued"] >= 1
        # Its experts had one replica: they were read from the checkpoint or from backups.
        moved = {k: n for r in (0, 2) for k, n in status["ranks"][r]["experts_moved"].items() if n}
        assert set(moved) & {"checkpoint", "backup"}
