"""What a client may ask for, and how the tokens it gets become text. No socket, no clock."""

import codecs
import dataclasses
import reprlib
from collections.abc import Iterable

MAX_TOKENS_DEFAULT = 16
SEED_MIN, SEED_MAX = -(2**63), 2**63 - 1

_SHORT = reprlib.Repr(maxstring=80, maxother=80, maxlong=40)


class RequestError(ValueError):
    """A request that is refused. `field` is the part at fault, `code` is OpenAI's word for it."""

    def __init__(self, status: int, field: str | None, message: str, code: str | None = None):
        super().__init__(message)
        self.status, self.field, self.code = status, field, code


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompletionLimits:
    """What this service can answer."""

    model: str
    context_tokens: int  # prompt with its BOS, and completion
    max_stop: int = 4
    stop_chars_max: int = 64
    vocab_size: int = 256
    bos_token: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompletionRequest:
    """A request that was checked: every value is within its limits."""

    prompt: tuple[int, ...]  # begins with BOS
    max_tokens: int
    temperature: float
    top_p: float
    seed: int | None
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool
    model: str


# Fields of OpenAI's API with one value that this service can honour: (test, value, way out).
_ONLY = {
    "n": (lambda x: type(x) is int and x == 1, "1", "send one request per completion"),
    "best_of": (lambda x: type(x) is int and x == 1, "1", "send one request per candidate"),
    "echo": (lambda x: x is False, "false", "put the prompt in front of the answer yourself"),
    "logprobs": (lambda x: False, "null", "leave it out"),
    "suffix": (lambda x: False, "null", "leave it out"),
    "presence_penalty": (lambda x: type(x) in (int, float) and x == 0, "0", "leave it out"),
    "frequency_penalty": (lambda x: type(x) in (int, float) and x == 0, "0", "leave it out"),
    "logit_bias": (lambda x: x == {}, "null or {}", "leave it out"),
    "user": (lambda x: isinstance(x, str), "a string", "leave it out"),
}
_OWN = ("model", "prompt", "max_tokens", "temperature", "top_p", "seed", "stop", "stream")
FIELDS = (*_OWN, "stream_options", *_ONLY)


def parse_request(body: object, limits: CompletionLimits) -> CompletionRequest:
    """Reads the body of `POST /v1/completions`. An optional field that is null counts as absent.

    `{"model": "tiny", "prompt": "Hi"}` gives prompt (0, 72, 105), 16 tokens at temperature 1.

    Raises RequestError, naming the field. Follows OpenAI's "Create completion" reference; what
    this service does not do is refused, never ignored.
    """
    if not isinstance(body, dict):
        raise RequestError(400, None, f"the body is {_SHORT.repr(body)}; send a JSON object")
    for name in body:
        if name not in FIELDS:
            raise _refusal(name, f"is not a field of this API; use {', '.join(FIELDS)}")
    fields = {name: value for name, value in body.items() if value is not None}
    _check_model(fields, limits)
    for name in _ONLY.keys() & fields.keys():
        allowed, value, way_out = _ONLY[name]
        if not allowed(fields[name]):
            raise _wrong(name, fields[name], f"this service supports only {value}; {way_out}")
    prompt = _prompt(fields.get("prompt"), limits)
    stream = _boolean(fields, "stream")
    return CompletionRequest(
        prompt=prompt,
        max_tokens=_max_tokens(fields, len(prompt), limits),
        temperature=_number(fields, "temperature", lambda x: 0 <= x <= 2, "from 0 to 2"),
        top_p=_number(fields, "top_p", lambda x: 0 < x <= 1, "above 0 and at most 1"),
        seed=_integer(fields, "seed", None, SEED_MIN, SEED_MAX),
        stop=_stop(fields.get("stop", []), limits),
        stream=stream,
        include_usage=_include_usage(fields, stream),
        model=limits.model,
    )


class TextAssembler:
    """Turns tokens, which are bytes, into text that can be sent at once and never taken back.

    It holds back an unfinished UTF-8 character, and text that may be the beginning of a stop
    string: with the stop "END", `feed(b"the E")` gives "the ", then `feed(b"N")` gives "", and
    `feed(b"!")` gives "EN!". Invalid bytes become U+FFFD. The stop string that counts is the one
    that is complete first, and of those that end together the longest; how tokens are grouped
    into calls changes nothing.
    """

    def __init__(self, stop: tuple[str, ...]):
        self.stopped = False  # a stop string was met; the text ends in front of it
        self.num_tokens = 0  # taken in, up to the token that completed the stop string
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""  # never longer than the longest stop string
        self._searches = tuple(_Search(word) for word in stop)

    def feed(self, tokens: Iterable[int]) -> str:
        """Returns the text that became certain; "" once stopped. Raises ValueError above 255."""
        parts = []
        for token in tokens:
            if self.stopped:
                break
            parts.append(self._advance(self._decoder.decode(bytes((token,)))))
            self.num_tokens += 1
        return "".join(parts)

    def finish(self) -> str:
        """Returns what was held back: no more tokens come."""
        if self.stopped:
            return ""
        text = self._advance(self._decoder.decode(b"", final=True))
        held, self._held = self._held, ""
        return text + held

    def _advance(self, text: str) -> str:
        ready = ""
        for char in text:
            self._held += char
            matched = [search.advance(char) for search in self._searches]
            found = [search.size for search in self._searches if search.found]
            self.stopped = bool(found)
            certain = len(self._held) - max(found or matched, default=0)
            ready += self._held[:certain]
            self._held = "" if found else self._held[certain:]
            if found:
                break
        return ready


class _Search:
    """Looks for one word, character by character (Knuth, Morris and Pratt, 1977)."""

    def __init__(self, word: str):
        self.size, self._word, self._matched = len(word), word, 0
        self._shorter = [0]  # of a prefix: length of its longest proper suffix that is a prefix
        for end in range(1, len(word)):
            size = self._shorter[-1]
            while size and word[size] != word[end]:
                size = self._shorter[size - 1]
            self._shorter.append(size + (word[size] == word[end]))

    @property
    def found(self) -> bool:
        return self._matched == self.size

    def advance(self, char: str) -> int:
        """Returns how many characters of the word the text now ends with. Ends once it is found."""
        size = self._matched
        while size and self._word[size] != char:
            size = self._shorter[size - 1]
        self._matched = size + (self._word[size] == char)
        return self._matched


def _refusal(field: str, problem: str) -> RequestError:
    return RequestError(400, field[:80], f"{field[:80]} {problem}")


def _wrong(field: str, value: object, expectation: str) -> RequestError:
    return _refusal(field, f"is {_SHORT.repr(value)}; {expectation}")


def _check_model(fields: dict, limits: CompletionLimits) -> None:
    model = fields.get("model")
    if not isinstance(model, str):
        raise _wrong("model", model, f"send the name of the model, {limits.model!r}")
    if model != limits.model:
        message = f"model is {_SHORT.repr(model)}; this service has only {limits.model!r}"
        raise RequestError(404, "model", message, code="model_not_found")


def _prompt(prompt: object, limits: CompletionLimits) -> tuple[int, ...]:
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        (prompt,) = prompt
    if isinstance(prompt, str):
        tokens = (limits.bos_token, *_text_tokens(prompt, limits))
    elif isinstance(prompt, list) and prompt and all(type(token) is int for token in prompt):
        tokens = tuple(prompt) if prompt[0] == limits.bos_token else (limits.bos_token, *prompt)
    else:
        raise _wrong("prompt", prompt, "send one string, or one list with at least one token id")
    if outside := [token for token in tokens if not 0 <= token < limits.vocab_size]:
        raise _refusal(
            "prompt",
            f"holds token {_SHORT.repr(outside[0])}; ids run from 0 to {limits.vocab_size - 1}",
        )
    if len(tokens) >= limits.context_tokens:
        message = (
            f"prompt has {len(tokens)} tokens with its BOS; the context of {limits.context_tokens} "
            "must also hold one token of completion; shorten the prompt"
        )
        raise RequestError(400, "prompt", message, code="context_length_exceeded")
    return tokens


def _text_tokens(text: str, limits: CompletionLimits) -> bytes:
    try:
        tokens = text.encode()
    except UnicodeEncodeError as error:
        problem = f"has a lone surrogate at character {error.start}; send valid Unicode"
        raise _refusal("prompt", problem) from None
    if (at := tokens.find(limits.bos_token)) >= 0:
        raise _refusal(
            "prompt",
            f"has byte {limits.bos_token} at byte {at}, which marks the beginning of a text; "
            "remove it, or send token ids",
        )
    return tokens


def _max_tokens(fields: dict, prompt_tokens: int, limits: CompletionLimits) -> int:
    room = limits.context_tokens - prompt_tokens
    wanted = _integer(fields, "max_tokens", MAX_TOKENS_DEFAULT, 1, None)
    if wanted > room:
        message = (
            f"max_tokens is {_SHORT.repr(wanted)} and the prompt has {prompt_tokens} tokens with "
            f"its BOS; the context is {limits.context_tokens}: ask for at most {room}"
        )
        raise RequestError(400, "max_tokens", message, code="context_length_exceeded")
    return wanted


def _integer(
    fields: dict, name: str, default: int | None, low: int, high: int | None
) -> int | None:
    value = fields.get(name, default)
    if value is None:
        return None
    if type(value) is int and low <= value and (high is None or value <= high):
        return value
    limits = f"of at least {low}" if high is None else f"from {low} to {high}"
    raise _wrong(name, value, f"send an integer {limits}")


def _number(fields: dict, name: str, allowed, limits: str) -> float:
    """A number, 1 where absent. NaN and infinities pass no comparison that `allowed` makes."""
    value = fields.get(name, 1.0)
    if type(value) not in (int, float) or not allowed(value):
        raise _wrong(name, value, f"send a number {limits}")
    return float(value)


def _boolean(fields: dict, name: str) -> bool:
    value = fields.get(name, False)
    if not isinstance(value, bool):
        raise _wrong(name, value, "send true or false")
    return value


def _stop(stop: object, limits: CompletionLimits) -> tuple[str, ...]:
    words = [stop] if isinstance(stop, str) else stop
    expectation = f"send a string or a list of at most {limits.max_stop} strings"
    if not isinstance(words, list) or len(words) > limits.max_stop:
        raise _wrong("stop", stop, expectation)
    for word in words:
        if not isinstance(word, str) or not 0 < len(word) <= limits.stop_chars_max:
            raise _wrong("stop", word, f"{expectation} of 1 to {limits.stop_chars_max} characters")
        if any("\ud800" <= char <= "\udfff" for char in word):
            raise _wrong("stop", word, "it has a lone surrogate; send valid Unicode")
    return tuple(words)


def _include_usage(fields: dict, stream: bool) -> bool:
    options = fields.get("stream_options", {})
    if not isinstance(options, dict):
        raise _wrong("stream_options", options, 'send an object like {"include_usage": true}')
    if "stream_options" in fields and not stream:
        raise _wrong("stream_options", options, "it needs stream: true; set that or leave it out")
    if unknown := options.keys() - {"include_usage"}:
        raise _refusal(f"stream_options.{min(unknown)}", "is not an option; use include_usage")
    value = options.get("include_usage")
    if value is not None and not isinstance(value, bool):
        raise _wrong("stream_options.include_usage", value, "send true or false")
    return value is True
