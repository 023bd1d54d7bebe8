"""Fields that clients send by default, and the values of them that change no answer.

OpenAI's, vLLM's and SGLang's clients send many fields with their neutral values. Those are taken;
any other value is refused by name, never ignored. Null counts as absent for every field.
"""

import dataclasses
import json
from collections.abc import Callable


@dataclasses.dataclass(frozen=True)
class Neutral:
    """What is taken of a field: a test, the values in words, and the way out for others."""

    test: Callable[[object], bool]
    values: str
    way_out: str = "leave it out"


def only(*values: object, way_out: str = "leave it out") -> Neutral:
    """Takes these values; 1 and 1.0 are equal, 1 and true are not.

    >>> only(0, -1).test(-1.0), only(0).test(False), only(0, -1).values
    (True, False, '0 or -1')
    """
    text = " or ".join(json.dumps(value) for value in values)
    return Neutral(lambda x: any(_alike(x, value) for value in values), text, way_out)


def _alike(x: object, value: object) -> bool:
    if isinstance(x, bool) or isinstance(value, bool):
        return x is value
    return x == value


_OBJECT = Neutral(lambda x: isinstance(x, dict), "an object")
_STRING = Neutral(lambda x: isinstance(x, str), "a string")
_BOOLEAN = Neutral(lambda x: isinstance(x, bool), "a boolean")
_INTEGER = Neutral(lambda x: type(x) is int, "an integer")
_NO_TOOLS = "send no tools: this service parses no calls out of answers"
_TEXT = "leave it out: answers are text"

# Of both endpoints.
SHARED = {
    # Sampling.
    "length_penalty": only(1),
    "use_beam_search": only(False),
    "early_stopping": only(False),
    "allowed_token_ids": only([]),
    "prompt_logprobs": only(0, False),
    # Text.
    "skip_special_tokens": only(True),
    "spaces_between_special_tokens": only(True),
    "include_stop_str_in_output": only(False),
    "no_stop_trim": only(False),
    "return_token_ids": only(False),
    "return_tokens_as_token_ids": only(False),
    "add_special_tokens": only(True),
    # Form of the answer.
    "response_format": only({"type": "text"}, way_out=_TEXT),
    "structured_outputs": only({}, way_out=_TEXT),
    "logits_processors": only([]),
    # These never change an answer.
    "user": _STRING,
    "metadata": _OBJECT,
    "store": _BOOLEAN,
    "safety_identifier": _STRING,
    "prompt_cache_key": _STRING,
    "service_tier": only("auto", "default"),
    "request_id": _STRING,
    "rid": _STRING,
    "priority": _INTEGER,
    "kv_transfer_params": only({}),
    "vllm_xargs": only({}),
}
COMPLETION = SHARED | {
    "logprobs": only(False),
    "suffix": only(""),
}
CHAT = SHARED | {
    "logprobs": only(False),
    "top_logprobs": only(0),
    "modalities": only(["text"], way_out=_TEXT),
    "tools": only([], way_out=_NO_TOOLS),
    "functions": only([], way_out=_NO_TOOLS),
    # Without tools "auto" is an answer in text.
    "tool_choice": only("none", "auto", way_out=_NO_TOOLS),
    "function_call": only("none", "auto", way_out=_NO_TOOLS),
    "parallel_tool_calls": _BOOLEAN,
    "echo": only(False),
    "add_generation_prompt": only(True),
    "continue_final_message": only(False),
    "documents": only([]),
    "include_reasoning": only(True),
    "separate_reasoning": only(True),
    "stream_reasoning": only(True),
}
