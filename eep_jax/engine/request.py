"""Requests of a rank, and the tokens that it produces for them."""

import dataclasses

NOT_FINITE = "not_finite"  # a finish: the model's logits were no numbers

LOGIT_BIAS_MAX = 300  # entries of a request
STOP_TOKENS_MAX = 64
END_TOKENS_MAX = 128  # with those of the model
BAD_WORDS_MAX = 128  # sequences of tokens; a word may have two, at a text's start and within it
BAD_WORD_TOKENS_MAX = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shaping:
    """What a request asks of its tokens beyond temperature and top_p; by default nothing."""

    top_k: int = 0  # 0: all
    min_p: float = 0.0
    repetition_penalty: float = 1.0  # of tokens of the prompt and the answer
    presence_penalty: float = 0.0  # these two of the answer's alone
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_tokens: int = 0  # before which no end token may come
    stop_token_ids: tuple[int, ...] = ()  # end tokens beside the model's
    ignore_eos: bool = False  # the model's end tokens end nothing
    bad_words: tuple[tuple[int, ...], ...] = ()  # sequences of tokens that no answer has

    @property
    def counts_tokens(self) -> bool:
        return bool(self.repetition_penalty != 1 or self.presence_penalty or self.frequency_penalty)

    @property
    def shapes_logits(self) -> bool:
        """Whether a step must do anything for it; the rest is done where tokens are committed."""
        narrows = self.top_k or self.min_p
        return bool(
            self.counts_tokens or narrows or self.logit_bias or self.min_tokens or self.bad_words
        )


NO_SHAPING = Shaping()


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
    shaping: Shaping = NO_SHAPING


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
