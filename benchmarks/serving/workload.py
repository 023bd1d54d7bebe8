"""Requests of random lengths over real text, the same ones for the same seed."""

import dataclasses
import pathlib
import random

TEXT = pathlib.Path(__file__).parent / "genesis.txt"  # King James Version, public domain


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """Lengths are uniform in `[n (1 - range_ratio), n (1 + range_ratio)]`, at least 1 token.

    Every other request is greedy; the others are drawn at `temperature` with a seed of their own,
    so that each has one right answer.
    """

    input_tokens: int = 64
    output_tokens: int = 64
    range_ratio: float = 0.0
    distinct: int = 32  # bodies; the load goes around them
    temperature: float = 0.8
    bytes_per_token: float = 1.0
    seed: int = 0
    ignore_eos: bool = False  # vLLM's and SGLang's extension; this project refuses the field

    def __post_init__(self):
        for name in ("input_tokens", "output_tokens", "distinct"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if not 0 <= self.range_ratio < 1:
            raise ValueError(f"{self.range_ratio=} must be at least 0 and below 1")
        if not self.bytes_per_token > 0:
            raise ValueError(f"{self.bytes_per_token=} must be above 0")

    @property
    def longest(self) -> tuple[int, int]:
        """The most prompt and output tokens a request may have."""
        most = lambda n: int(n * (1 + self.range_ratio))
        return most(self.input_tokens), most(self.output_tokens)


def make_jobs(workload: Workload, model: str, text: str) -> list[dict]:
    """Bodies of `POST /v1/completions`. Raises ValueError where the text is too short."""
    draw = random.Random(workload.seed)
    needed = int(workload.longest[0] * workload.bytes_per_token)
    if len(text) <= needed:
        raise ValueError(
            f"the text has {len(text)} characters, a prompt may need {needed}; "
            "give a longer --text_file or a smaller --random_input_len"
        )

    def length(mean: int) -> int:
        spread = mean * workload.range_ratio
        return max(1, draw.randint(int(mean - spread), int(mean + spread)))

    jobs = []
    for number in range(workload.distinct):
        size = int(length(workload.input_tokens) * workload.bytes_per_token)
        start = draw.randrange(len(text) - size)
        body = {"model": model, "prompt": text[start : start + max(1, size)]}
        body["max_tokens"] = length(workload.output_tokens)
        if number % 2:
            body |= {"temperature": workload.temperature, "seed": draw.randrange(2**31)}
        else:
            body["temperature"] = 0
        jobs.append(body | ({"ignore_eos": True} if workload.ignore_eos else {}))
    return jobs
