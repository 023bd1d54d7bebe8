"""Bodies that common clients send by default are taken, and mean what they would without them."""

import pytest

from eep_jax.runtime.http.chat import parse_chat
from eep_jax.runtime.http.checks import RequestError
from eep_jax.runtime.http.completion import CompletionLimits, parse_request
from eep_jax.runtime.http.neutral_fields import CHAT, COMPLETION, SHARED
from eep_jax.runtime.http.shaping_fields import SHAPING
from eep_jax.runtime.text.chat_template import ChatTemplate

LIMITS = CompletionLimits(model="tiny", context_tokens=256)
TEMPLATE = ChatTemplate("{{ messages[0].content }}", {})
PLAIN = {"model": "tiny", "prompt": "Hi", "max_tokens": 8, "temperature": 0.0}
MESSAGES = [{"role": "user", "content": "Hi"}]
PLAIN_CHAT = {"model": "tiny", "messages": MESSAGES, "max_tokens": 8, "temperature": 0.0}

COMPLETIONS = {
    "vllm bench serve": {
        "best_of": 1,
        "repetition_penalty": 1.0,
        "logprobs": None,
        "ignore_eos": False,
        "top_p": 1.0,
        "top_k": -1,
        "min_p": 0.0,
    },
    "sglang bench_serving": {"best_of": 1, "ignore_eos": False},
    "lm-eval": {"seed": 1234, "stop": ["\n\n"], "logprobs": None, "echo": False},
    "langchain": {
        "n": 1,
        "best_of": 1,
        "frequency_penalty": 0,
        "presence_penalty": 0,
        "logit_bias": {},
        "top_p": 1,
    },
    "vllm's python client": {
        "use_beam_search": False,
        "length_penalty": 1.0,
        "stop_token_ids": [],
        "include_stop_str_in_output": False,
        "min_tokens": 0,
        "skip_special_tokens": True,
        "spaces_between_special_tokens": True,
        "add_special_tokens": True,
        "priority": 0,
        "request_id": "bench-1",
    },
}
CHATS = {
    "guidellm": {"max_completion_tokens": 8, "ignore_eos": False, "n": 1},
    "openai": {
        "n": 1,
        "metadata": {"run": "1"},
        "store": False,
        "service_tier": "auto",
        "tools": [],
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "response_format": {"type": "text"},
        "logprobs": False,
        "user": "me",
    },
    "vllm": {
        "add_generation_prompt": True,
        "continue_final_message": False,
        "repetition_penalty": 1,
        "top_k": 0,
        "stop_token_ids": None,
    },
    "sglang": {"separate_reasoning": True, "stream_reasoning": True, "rid": "7"},
}


@pytest.mark.parametrize("extra", COMPLETIONS.values(), ids=COMPLETIONS.keys())
def test_completions(extra):
    own = {name: value for name, value in extra.items() if name not in (*COMPLETION, *SHAPING)}
    assert parse_request(PLAIN | extra, LIMITS) == parse_request(PLAIN | own, LIMITS)


@pytest.mark.parametrize("extra", CHATS.values(), ids=CHATS.keys())
def test_chats(extra):
    own = {name: value for name, value in extra.items() if name not in (*CHAT, *SHAPING)}
    wanted = parse_chat(PLAIN_CHAT, LIMITS, TEMPLATE)
    base = {"model": "tiny", "messages": MESSAGES, "temperature": 0.0}
    base |= {} if "max_completion_tokens" in extra else {"max_tokens": 8}
    assert parse_chat(base | extra, LIMITS, TEMPLATE) == wanted
    assert parse_chat(base | own, LIMITS, TEMPLATE) == wanted


@pytest.mark.parametrize("name", sorted(SHARED))
def test_both_endpoints_take_the_same_values_and_name_the_field_of_another(name):
    for value in (object, [object], {"other": 1}, 17.5, "other"):
        taken = SHARED[name].test(value)
        for parse, body in (
            (lambda b: parse_request(b, LIMITS), PLAIN),
            (lambda b: parse_chat(b, LIMITS, TEMPLATE), PLAIN_CHAT),
        ):
            if taken:
                parse(body | {name: value})
                continue
            with pytest.raises(RequestError, match=name) as error:
                parse(body | {name: value})
            assert (error.value.status, error.value.field) == (400, name)


def test_a_salt_is_passed_on():
    assert parse_request(PLAIN | {"cache_salt": "mine"}, LIMITS).cache_salt == "mine"
    assert parse_chat(PLAIN_CHAT | {"cache_salt": "mine"}, LIMITS, TEMPLATE).cache_salt == "mine"
