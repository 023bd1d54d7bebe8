"""Requests of a rank, and the tokens that it produces for them."""

import dataclasses

NOT_FINITE = "not_finite"  # a finish: the model's logits were no numbers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """Continue `prompt` with at most `max_tokens`, of which `produced` are known already."""

    id: str
    prompt: tuple[int, ...]
    produced: tuple[int, ...] = ()
    max_tokens: int
    temperature: float
    top_p: float
    seed: int  # 64 bits; with the position it makes the sampling key
    cache_salt: str = ""  # only requests with equal salts share cached prefixes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Progress:
    """New tokens of a request, from index `start` of all that were produced.

    `finish` is "" while it goes on, else "length", "stop" (end-of-text token), "cancelled" or
    NOT_FINITE.
    """

    id: str
    start: int
    tokens: tuple[int, ...]
    finish: str = ""
    dropped: int = 0  # choices of experts that had no live replica (policy degrade)
