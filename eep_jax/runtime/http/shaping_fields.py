"""Fields of both endpoints that shape the choice of tokens beyond temperature and top_p.

Names and meanings are vLLM's and OpenAI's. Values out of range are refused, naming the field.
"""

from eep_jax.engine.request import (
    BAD_WORD_TOKENS_MAX,
    BAD_WORDS_MAX,
    LOGIT_BIAS_MAX,
    STOP_TOKENS_MAX,
    Shaping,
)
from eep_jax.runtime.http.checks import boolean, integer, number, unicode, wrong
from eep_jax.runtime.text.tokenizer import Tokenizer

BIAS_LIMIT = 100
REPETITION_MAX = 10
_PENALTIES = ("presence_penalty", "frequency_penalty")
SHAPING = (
    *("top_k", "min_p", "repetition_penalty", *_PENALTIES, "logit_bias", "min_tokens"),
    *("stop_token_ids", "ignore_eos", "bad_words"),
)


def shaping_fields(fields: dict, tokenizer: Tokenizer, max_tokens: int) -> Shaping:
    """Reads the fields. `{"top_k": 40, "logit_bias": {"7": -100}}` forbids token 7, nearly."""
    penalties = {
        name: number(fields, name, lambda x: -2 <= x <= 2, "from -2 to 2", 0.0)
        for name in _PENALTIES
    }
    asked = _stop_token_ids(fields.get("stop_token_ids", []), tokenizer)
    ignores = boolean(fields, "ignore_eos")
    own_ends = frozenset() if ignores else tokenizer.end_tokens
    return Shaping(
        top_k=_top_k(fields, tokenizer),
        min_p=number(fields, "min_p", lambda x: 0 <= x <= 1, "from 0 to 1", 0.0),
        repetition_penalty=number(
            fields,
            "repetition_penalty",
            lambda x: 0 < x <= REPETITION_MAX,
            f"above 0 and at most {REPETITION_MAX}; above 1 discourages repetition",
            1.0,
        ),
        **penalties,
        logit_bias=_logit_bias(fields.get("logit_bias", {}), tokenizer),
        min_tokens=_min_tokens(fields, max_tokens),
        stop_token_ids=tuple(sorted(asked | own_ends)),
        ignore_eos=ignores,
        bad_words=_bad_words(fields.get("bad_words", []), tokenizer),
    )


def _top_k(fields: dict, tokenizer: Tokenizer) -> int:
    if fields.get("top_k") == -1.0 and not isinstance(fields["top_k"], bool):
        return 0
    k = integer(fields, "top_k", 0, 0, None, "an integer of at least 1, or 0 or -1 for all tokens")
    return 0 if k >= tokenizer.vocab_size else k


def _min_tokens(fields: dict, max_tokens: int) -> int:
    least = integer(fields, "min_tokens", 0, 0, None)
    if least > max_tokens:
        raise wrong(
            "min_tokens", least, f"the answer has at most {max_tokens} tokens; ask for less"
        )
    return least


def _logit_bias(bias: object, tokenizer: Tokenizer) -> tuple[tuple[int, float], ...]:
    size = tokenizer.vocab_size
    expected = f'send an object of at most {LOGIT_BIAS_MAX} token ids like {{"7": -100}}'
    if not isinstance(bias, dict) or len(bias) > LOGIT_BIAS_MAX:
        raise wrong("logit_bias", bias, expected)
    found = {}
    for key, value in bias.items():
        if not (key.isascii() and key.isdecimal() and int(key[:10]) < size and len(key) < 10):
            raise wrong("logit_bias", key, f"{expected}; ids run from 0 to {size - 1}")
        if type(value) not in (int, float) or not -BIAS_LIMIT <= value <= BIAS_LIMIT:
            limits = f"a bias is a number from -{BIAS_LIMIT} to {BIAS_LIMIT}"
            raise wrong("logit_bias", {key: value}, limits)
        if int(key) in found:
            raise wrong("logit_bias", key, f"token {int(key)} is there twice; send it once")
        found[int(key)] = float(value)
    return tuple(sorted(found.items()))


def _stop_token_ids(ids: object, tokenizer: Tokenizer) -> frozenset[int]:
    size = tokenizer.vocab_size
    expected = f"send a list of at most {STOP_TOKENS_MAX} token ids from 0 to {size - 1}"
    if not isinstance(ids, list) or len(ids) > STOP_TOKENS_MAX:
        raise wrong("stop_token_ids", ids, expected)
    for token in ids:
        if type(token) is not int or not 0 <= token < size:
            raise wrong("stop_token_ids", token, expected)
    return frozenset(ids)


def _bad_words(words: object, tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    most = BAD_WORDS_MAX // 2
    expected = f"send a list of at most {most} strings, none of them empty"
    if not isinstance(words, list) or len(words) > most:
        raise wrong("bad_words", words, expected)
    found = []
    for word in words:
        if not isinstance(word, str) or not word.strip():
            raise wrong("bad_words", word, expected)
        unicode("bad_words", word)
        for tokens in _spellings(word, tokenizer):
            if len(tokens) > BAD_WORD_TOKENS_MAX:
                problem = f"it has {len(tokens)} tokens, at most {BAD_WORD_TOKENS_MAX} are taken"
                raise wrong("bad_words", word, problem)
            found.append(tokens)
    return tuple(dict.fromkeys(found))


def _spellings(word: str, tokenizer: Tokenizer) -> list[tuple[int, ...]]:
    """Its tokens at the start of a text and, where these are others, behind a space."""
    first = tokenizer.encode_rendered(word)
    inside = tokenizer.encode_rendered(" " + word.lstrip())
    differs = inside[:1] != first[:1] and len(inside) == len(first)
    return [tokens for tokens in (first, inside if differs else ()) if tokens]
