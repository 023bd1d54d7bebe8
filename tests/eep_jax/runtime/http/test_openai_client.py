"""The client library of OpenAI against this API: whole answers, streams, chats, and errors."""

import asyncio
import contextlib

import openai
import pytest
from aiohttp.test_utils import TestServer

from eep_jax.runtime.http.app import build_app
from eep_jax.runtime.http.completion import CompletionLimits
from eep_jax.runtime.text.chat_template import ChatTemplate
from tests.support.fake_service import FakeService, full_service, spell

LIMITS = CompletionLimits(model="org/tiny", context_tokens=256)
TEMPLATE = ChatTemplate(
    "{% for m in messages %}<{{ m.role }}>{{ m.tool_calls }}{{ m.content }}{% endfor %}", {}
)
DEADLINE_S = 120.0
HI = [{"role": "user", "content": "Hi"}]


@contextlib.asynccontextmanager
async def connected(service: FakeService):
    server = TestServer(build_app(service, LIMITS, template=TEMPLATE))
    await server.start_server()
    url = str(server.make_url("/v1"))
    client = openai.AsyncOpenAI(base_url=url, api_key="any", max_retries=0, timeout=DEADLINE_S)
    try:
        yield client
    finally:
        await client.close()
        await server.close()


def run(story) -> None:
    asyncio.run(asyncio.wait_for(story, DEADLINE_S))


def test_completions_whole_and_streamed():
    async def story():
        async with connected(FakeService(spell("hello"))) as client:
            how = {"model": "org/tiny", "prompt": ["Hi", "Ho"], "n": 2, "max_tokens": 5}
            how |= {"presence_penalty": 0.5, "frequency_penalty": 0.5, "logit_bias": {"7": -100}}
            extra = {"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1, "ignore_eos": True}
            whole = await client.completions.create(**how, extra_body=extra)
            assert [c.text for c in whole.choices] == ["hello"] * 4
            assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (6, 20)
            texts = [""] * 4
            usage = {"include_usage": True}
            events = await client.completions.create(**how, stream=True, stream_options=usage)
            async for event in events:
                for choice in event.choices:
                    texts[choice.index] += choice.text
                last = event
            assert texts == ["hello"] * 4 and last.usage.completion_tokens == 20

    run(story())


def test_a_chat_whole_streamed_and_sent_back():
    async def story():
        service = FakeService(spell("hello"))
        async with connected(service) as client:
            create = client.chat.completions.create
            first = await create(model="org/tiny", messages=HI, user="me", max_completion_tokens=9)
            message = first.choices[0].message
            assert (message.content, message.role) == ("hello", "assistant")
            text = ""
            # The library's own object is sent back, with all of its empty fields.
            events = await create(model="org/tiny", messages=[*HI, message, *HI], stream=True)
            async for event in events:
                text += event.choices[0].delta.content or ""
            assert text == "hello"
            asked = bytes(service.submitted[-1][0].prompt).decode()
            assert asked == "<user>Hi<assistant>hello<user>Hi"

    run(story())


def test_a_conversation_with_tools_comes_back():
    async def story():
        service = FakeService(spell("4"))
        async with connected(service) as client:
            call = {"id": "1", "type": "function"}
            call["function"] = {"name": "add", "arguments": '{"a": 2}'}
            said = [*HI, {"role": "assistant", "tool_calls": [call]}]
            said.append({"role": "tool", "tool_call_id": "1", "content": "4"})
            answer = await client.chat.completions.create(model="org/tiny", messages=said)
            assert answer.choices[0].message.content == "4"
            assert "'arguments': {'a': 2}" in bytes(service.submitted[-1][0].prompt).decode()

    run(story())


def test_errors_are_the_librarys():
    async def story():
        async with connected(FakeService(spell("x"))) as client:
            create = client.completions.create
            with pytest.raises(openai.BadRequestError) as caught:
                await create(model="org/tiny", prompt="Hi", presence_penalty=3)
            assert caught.value.param == "presence_penalty" and caught.value.request_id
            with pytest.raises(openai.NotFoundError) as missing:
                await create(model="other", prompt="Hi")
            assert missing.value.code == "model_not_found"
            assert [model.id async for model in client.models.list()] == ["org/tiny"]
        async with connected(full_service()) as client:
            with pytest.raises(openai.RateLimitError):
                await client.completions.create(model="org/tiny", prompt="Hi")

    run(story())
