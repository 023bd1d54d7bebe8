"""Bodies of `POST /tokenize` and `POST /detokenize`, as vLLM has them."""

from eep_jax.runtime.http.chat import rendered
from eep_jax.runtime.http.checks import boolean, refusal, unicode, wrong
from eep_jax.runtime.http.completion import CompletionLimits, known_fields
from eep_jax.runtime.http.neutral_fields import only
from eep_jax.runtime.text.chat_template import ChatTemplate

_NEUTRAL = {"return_token_strs": only(False), "add_generation_prompt": only(True)}
TOKENIZE = (
    *("model", "prompt", "messages", "add_special_tokens", "chat_template_kwargs"),
    *("reasoning_effort", *_NEUTRAL),
)
DETOKENIZE = ("model", "tokens")


def tokenize(body: object, limits: CompletionLimits, template: ChatTemplate | None) -> dict:
    """The tokens of a `prompt`, or of `messages` through the model's template.

    `{"prompt": "Hi"}` gives `{"tokens": [0, 72, 105], "count": 3, ...}`; the model may be left out.
    Raises RequestError, naming the field.
    """
    fields = _fields(body, TOKENIZE, _NEUTRAL, limits)
    if ("prompt" in fields) == ("messages" in fields):
        raise refusal("prompt", "and messages are both there, or neither; send one of them")
    if "messages" in fields:
        *_, tokens = rendered(fields, limits, template)
    else:
        tokens = _encoded(fields, limits)
    found = {"count": len(tokens), "max_model_len": limits.context_tokens, "tokens": list(tokens)}
    return found | {"token_strs": None}


def detokenize(body: object, limits: CompletionLimits) -> dict:
    """The text of `tokens`, without special ones. Raises RequestError, naming the field."""
    fields = _fields(body, DETOKENIZE, {}, limits)
    tokens, size = fields.get("tokens"), limits.tokenizer.vocab_size
    if not isinstance(tokens, list):
        raise wrong("tokens", tokens, "send a list of token ids")
    for token in tokens:
        if type(token) is not int or not 0 <= token < size:
            raise wrong("tokens", token, f"ids run from 0 to {size - 1}")
    decoder = limits.tokenizer.decoder()
    return {"prompt": "".join([*map(decoder.feed, tokens), decoder.finish()])}


def _fields(body: object, known, neutral: dict, limits: CompletionLimits) -> dict:
    if isinstance(body, dict) and body.get("model") is None:
        body = body | {"model": limits.model}
    return known_fields(body, known, neutral, limits)


def _encoded(fields: dict, limits: CompletionLimits) -> tuple[int, ...]:
    prompt = fields["prompt"]
    if not isinstance(prompt, str):
        raise wrong("prompt", prompt, "send a string")
    unicode("prompt", prompt)
    special = boolean(fields, "add_special_tokens", True)
    encode = limits.tokenizer.encode if special else limits.tokenizer.encode_rendered
    try:
        return encode(prompt)
    except ValueError as error:
        raise refusal("prompt", str(error)) from None
