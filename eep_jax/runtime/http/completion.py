"""Checks of a completion request, field by field. No socket, no clock.

`parse_requests` reads plain completions; `chat.parse_chats` reads conversations, by the same parts.
"""

import dataclasses

from eep_jax.runtime.http.checks import (
    SHORT,
    RequestError,
    boolean,
    integer,
    number,
    refusal,
    unicode,
    wrong,
)
from eep_jax.runtime.http.neutral_fields import COMPLETION, Neutral
from eep_jax.runtime.http.shaping_fields import SHAPING, shaping_fields
from eep_jax.runtime.serving.contract import CompletionRequest
from eep_jax.runtime.text.tokenizer import ByteTokenizer, Tokenizer

MAX_TOKENS_DEFAULT = 16
BYTES = ByteTokenizer()
SEED_MIN, SEED_MAX = -(2**63), 2**63 - 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompletionLimits:
    """Limits of the requests that this service accepts."""

    model: str
    context_tokens: int  # prompt with its BOS, and completion
    max_stop: int = 4
    choices_max: int = 128  # of one HTTP request, over all prompts
    stop_chars_max: int = 64
    tokenizer: Tokenizer = BYTES


SALT_CHARS_MAX = 256
_OWN = ("model", "prompt", "max_tokens", "temperature", "top_p", "seed", "stop", "stream")
_OWN = (*_OWN, "n", "best_of", "echo")
FIELDS = (*_OWN, "stream_options", "cache_salt", *SHAPING, *COMPLETION)


def parse_request(body: object, limits: CompletionLimits) -> CompletionRequest:
    """The first of `parse_requests`."""
    return parse_requests(body, limits)[0]


def parse_requests(body: object, limits: CompletionLimits) -> list[CompletionRequest]:
    """Reads the body of `POST /v1/completions`, one request for each of its choices.

    `{"model": "tiny", "prompt": "Hi"}` gives prompt (0, 72, 105), 16 tokens at temperature 1. Two
    prompts with n = 3 give six, those of the first prompt first. An optional field that is null
    counts as absent.

    Raises RequestError, naming the field. Follows OpenAI's "Create completion" reference; what
    this service does not do is refused, never ignored.
    """
    fields = known_fields(body, FIELDS, COMPLETION, limits)
    prompts = _prompts(fields.get("prompt"), limits)
    echo, requests = boolean(fields, "echo"), []
    for sent, prompt in prompts:
        length = answer_length(fields, "max_tokens", len(prompt), MAX_TOKENS_DEFAULT, limits)
        shared = sampling_fields(fields, limits, length)
        text = _text(sent, limits) if echo else ""
        requests.append(CompletionRequest(prompt=prompt, max_tokens=length, echo=text, **shared))
    return choices_of(fields, requests, limits)


def choices_of(
    fields: dict, requests: list[CompletionRequest], limits: CompletionLimits
) -> list[CompletionRequest]:
    """Each of the requests n times, with seeds that count up from the one that was sent."""
    n = integer(fields, "n", 1, 1, limits.choices_max)
    if fields.get("best_of", n) not in (1, n) or isinstance(fields.get("best_of"), bool):
        expected = f"this service returns all candidates; send n, {n}, or leave it out"
        raise wrong("best_of", fields["best_of"], expected)
    total = n * len(requests)
    if total > limits.choices_max:
        problem = f"{len(requests)} prompts of {n} answers are {total}"
        raise wrong("n", n, f"{problem}; ask for at most {limits.choices_max} at once")
    return [
        dataclasses.replace(
            request,
            index=n * number + again,
            choices=total,
            seed=None if request.seed is None else request.seed + again,
        )
        for number, request in enumerate(requests)
        for again in range(n)
    ]


def known_fields(
    body: object, known, neutral: dict[str, Neutral], limits: CompletionLimits
) -> dict:
    """The fields of a body that are not null. Raises RequestError for an unknown field or model.

    Of the fields in `neutral` only values that change no answer are taken.
    """
    if not isinstance(body, dict):
        raise RequestError(400, None, f"the body is {SHORT.repr(body)}; send a JSON object")
    for name in body:
        if name not in known:
            own = ", ".join(field for field in known if field not in neutral)
            raise refusal(name, f"is not a field of this API; use {own}")
    fields = {name: value for name, value in body.items() if value is not None}
    _check_model(fields, limits)
    for name in neutral.keys() & fields.keys():
        if not neutral[name].test(fields[name]):
            expected = f"this service supports only {neutral[name].values}"
            raise wrong(name, fields[name], f"{expected}; {neutral[name].way_out}")
    return fields


def sampling_fields(fields: dict, limits: CompletionLimits, max_tokens: int) -> dict:
    """The checked fields that both kinds of request share, besides prompt and length."""
    stream = boolean(fields, "stream")
    return {
        "temperature": number(fields, "temperature", lambda x: 0 <= x <= 2, "from 0 to 2"),
        "top_p": number(fields, "top_p", lambda x: 0 < x <= 1, "above 0 and at most 1"),
        "seed": integer(fields, "seed", None, SEED_MIN, SEED_MAX),
        "stop": _stop(fields.get("stop", []), limits),
        "stream": stream,
        "include_usage": _include_usage(fields, stream),
        "model": limits.model,
        "shaping": shaping_fields(fields, limits.tokenizer, max_tokens),
        "cache_salt": _salt(fields.get("cache_salt", "")),
    }


def _check_model(fields: dict, limits: CompletionLimits) -> None:
    model = fields.get("model")
    if not isinstance(model, str):
        raise wrong("model", model, f"send the name of the model, {limits.model!r}")
    if model != limits.model:
        message = f"model is {SHORT.repr(model)}; this service has only {limits.model!r}"
        raise RequestError(404, "model", message, code="model_not_found")


def _prompts(
    sent: object, limits: CompletionLimits
) -> list[tuple[str | list[int], tuple[int, ...]]]:
    """Each prompt as it was sent, and its tokens."""
    several = isinstance(sent, list) and bool(sent) and isinstance(sent[0], str | list)
    found = sent if several else [sent]
    if len(found) > limits.choices_max:
        raise wrong("prompt", sent, f"send at most {limits.choices_max} prompts at once")
    return [(one, _prompt(one, limits)) for one in found]


def _prompt(prompt: object, limits: CompletionLimits) -> tuple[int, ...]:
    if isinstance(prompt, str):
        unicode("prompt", prompt)
        try:
            tokens = limits.tokenizer.encode(prompt)
        except ValueError as error:
            raise refusal("prompt", str(error)) from None
    elif isinstance(prompt, list) and prompt and all(type(token) is int for token in prompt):
        tokens = limits.tokenizer.complete(tuple(prompt))
    else:
        expected = "send a string, a list of token ids, or a list of either; none may be empty"
        raise wrong("prompt", prompt, expected)
    if not tokens:
        raise wrong("prompt", prompt, "it has no tokens, and this model has no BOS; send some text")
    size = limits.tokenizer.vocab_size
    if outside := [token for token in tokens if not 0 <= token < size]:
        raise refusal(
            "prompt", f"holds token {SHORT.repr(outside[0])}; ids run from 0 to {size - 1}"
        )
    check_room("prompt", tokens, limits)
    return tokens


def _text(prompt: str | list[int], limits: CompletionLimits) -> str:
    """A prompt as text, without the special tokens of one that was sent as ids."""
    if isinstance(prompt, str):
        return prompt
    decoder = limits.tokenizer.decoder()
    return "".join([*map(decoder.feed, prompt), decoder.finish()])


def check_room(field: str, prompt: tuple[int, ...], limits: CompletionLimits) -> None:
    """Raises RequestError for a prompt that leaves no room for a token of completion."""
    if len(prompt) >= limits.context_tokens:
        message = (
            f"{field}: the prompt has {len(prompt)} tokens{_with_bos(limits)}; the context of "
            f"{limits.context_tokens} must also hold one token of completion; shorten it"
        )
        raise RequestError(400, field, message, code="context_length_exceeded")


def _with_bos(limits: CompletionLimits) -> str:
    return " with its BOS" if limits.tokenizer.has_bos else ""


def answer_length(
    fields: dict, name: str, prompt_tokens: int, default: int, limits: CompletionLimits
) -> int:
    """Most tokens of the answer: the field `name`, which must fit behind the prompt."""
    room = limits.context_tokens - prompt_tokens
    wanted = integer(fields, name, default, 1, None)
    if wanted > room:
        message = (
            f"{name} is {SHORT.repr(wanted)} and the prompt has {prompt_tokens} tokens"
            f"{_with_bos(limits)}; the context is {limits.context_tokens}: ask for at most {room}"
        )
        raise RequestError(400, name, message, code="context_length_exceeded")
    return wanted


def _stop(stop: object, limits: CompletionLimits) -> tuple[str, ...]:
    words = [stop] if isinstance(stop, str) else stop
    expectation = f"send a string or a list of at most {limits.max_stop} strings"
    if not isinstance(words, list) or len(words) > limits.max_stop:
        raise wrong("stop", stop, expectation)
    for word in words:
        if not isinstance(word, str) or not 0 < len(word) <= limits.stop_chars_max:
            raise wrong("stop", word, f"{expectation} of 1 to {limits.stop_chars_max} characters")
        if any("\ud800" <= char <= "\udfff" for char in word):
            raise wrong("stop", word, "it has a lone surrogate; send valid Unicode")
    return tuple(words)


def _salt(salt: object) -> str:
    """Requests with other salts share no cached prefix, so none can measure another's prompt."""
    if not isinstance(salt, str) or len(salt) > SALT_CHARS_MAX:
        raise wrong("cache_salt", salt, f"send a string of at most {SALT_CHARS_MAX} characters")
    unicode("cache_salt", salt)
    return salt


def _include_usage(fields: dict, stream: bool) -> bool:
    options = fields.get("stream_options", {})
    if not isinstance(options, dict):
        raise wrong("stream_options", options, 'send an object like {"include_usage": true}')
    if "stream_options" in fields and not stream:
        raise wrong("stream_options", options, "it needs stream: true; set that or leave it out")
    if unknown := options.keys() - {"include_usage"}:
        raise refusal(f"stream_options.{min(unknown)}", "is not an option; use include_usage")
    value = options.get("include_usage")
    if value is not None and not isinstance(value, bool):
        raise wrong("stream_options.include_usage", value, "send true or false")
    return value is True
