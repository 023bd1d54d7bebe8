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
class CacheUse:
    """The KV cache of a rank now, and what happened in it since the rank started."""

    pages: int
    held: int  # by sequences in batch rows
    cached: int  # that hold a known prefix, held or not
    asked_tokens: int  # of admitted requests
    hit_tokens: int  # of these, found in the prefix cache
    preempted: int  # times that a sequence had to give back its pages
    not_finite: int  # requests that ended since logits were no numbers


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
