"""One rank of `bench_static`: elastic and static engines in one process, timed in turn.

All engines get the same requests; each is checked against the dense model before it is timed, and
blocks of steps of all engines alternate, so that a disturbance of the machine affects all of them.
"""

import json
import pathlib
import time

from benchmarks.meeting import Meeting, join_mesh, meeting_of
from benchmarks.processes import config_of, with_ranks, worker
from benchmarks.serving.workload import TEXT

REPORT = "report.json"
PROMPT_TOKENS = 24
CHECKED_TOKENS = 16
TOLERANCE = {"float32": 1e-2, "bfloat16": 0.5}  # of logits: sums in another order


def measure(directory: pathlib.Path, rank: int, job: dict) -> None:
    """Checks and times all systems of the job; rank 0 writes REPORT."""
    config = with_ranks(config_of(job), job["ranks"])
    join_mesh(job["coordinator"], job["ranks"], rank)
    import numpy as np
    from jax.experimental import multihost_utils

    meeting = meeting_of(directory, rank, job)
    weights = load_weights(config)
    engines = {name: make_engine(name, config, rank, weights, meeting) for name in job["systems"]}
    requests = some_requests(config, rank)
    produced: dict[str, dict[str, list[int]]] = {}
    for name, engine in engines.items():
        meeting.share(f"{name}.ready")
        for request in requests:
            engine.scheduler.add(request)
        produced[name] = prefill(engine, len(requests))
    wrong = check(config, weights, requests, produced)
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    for block in range(job["blocks"] + 1):
        for name in rotated(list(engines), block):
            engine = engines[name]
            step_once(engine)  # all ranks are there when the clock starts
            begin_s = time.perf_counter()
            for _ in range(job["steps"]):
                step_once(engine)
            if block:  # the first one is warming up
                seconds[name].append(time.perf_counter() - begin_s)
    everyone = multihost_utils.process_allgather(np.array([len(wrong)]))
    if rank == 0:
        report = {"seconds": seconds, "wrong": wrong}
        report["ranks_wrong"] = np.asarray(everyone).reshape(-1).tolist()
        (directory / REPORT).write_text(json.dumps(report))


def rotated(names: list[str], turn: int) -> list[str]:
    """Each takes its turn at being first."""
    turn %= len(names)
    return names[turn:] + names[:turn]


def load_weights(config):
    from benchmarks.static.engine import Weights
    from eep_jax.storage.random_checkpoint import open_checkpoint

    checkpoint = open_checkpoint(config)
    return Weights(
        checkpoint.read_dense(), checkpoint.read_experts(list(range(config.model.experts)))
    )


def make_engine(name: str, config, rank: int, weights, meeting: Meeting):
    """`elastic`, `elastic_once`, `elastic_fixed`, or the name of an exchange."""
    import jax

    from benchmarks.static.elastic import open_engine
    from benchmarks.static.engine import StaticEngine

    if name.startswith("elastic"):
        redundancy = config.cluster.redundancy if name == "elastic" else 1
        more = {"redundancy": redundancy, "fixed": name == "elastic_fixed"}
        return open_engine(config, rank, weights, meeting, name, **more)
    return StaticEngine(config, jax.devices(), name, weights, agree=False)


def some_requests(config, rank: int) -> list:
    """One greedy request for each batch row, which does not end while anything is measured."""
    from eep_jax.engine.request import Request

    text, batch_rows = TEXT.read_bytes(), config.engine.batch_rows
    requests = []
    for batch_row in range(batch_rows):
        start = (rank * batch_rows + batch_row) * 101 % (len(text) - PROMPT_TOKENS)
        prompt = tuple(b % config.model.vocab_size for b in text[start : start + PROMPT_TOKENS])
        requests.append(
            Request(
                id=str(batch_row),
                prompt=prompt,
                max_tokens=config.engine.context_tokens - PROMPT_TOKENS,
                temperature=0.0,
                top_p=1.0,
                seed=batch_row,
            )
        )
    return requests


def step_once(engine):
    """The progress of one step. Raises RuntimeError where an elastic step was discarded."""
    from benchmarks.static.engine import StaticEngine

    if isinstance(engine, StaticEngine):
        return engine.advance()
    outcome = engine.advance()
    if not outcome.committed:
        raise RuntimeError(f"a step was discarded, accused are {outcome.accused}")
    return outcome.progress


def prefill(engine, requests: int) -> dict[str, list[int]]:
    """Steps until every request has CHECKED_TOKENS; returns these by request.

    All ranks have equally many prompts of equal length, so they need the same kinds of steps.
    """
    from benchmarks.static.engine import StaticEngine

    found: dict[str, list[int]] = {str(number): [] for number in range(requests)}
    while min(map(len, found.values())) < CHECKED_TOKENS:
        if isinstance(engine, StaticEngine):
            engine.next = max(engine.scheduler.vote(), engine.config.engine.step_sizes[0])
        for part in step_once(engine):
            found[part.id].extend(part.tokens)
    return {name: tokens[:CHECKED_TOKENS] for name, tokens in found.items()}


def check(config, weights, requests, produced) -> list[str]:
    """Errors of the tokens by the dense model, which has all experts in one process.

    A token is right if its logit is the largest, up to what sums in another order may change.
    """
    import jax.numpy as jnp
    import numpy as np

    from eep_jax.models.weights import build_dense_model, expert_name

    named = {expert_name(e): array for e, array in weights.experts.items()}
    dtype = jnp.dtype(config.engine.dtype)
    model = build_dense_model(config.model, weights.dense, named, dtype)
    wrong = []
    for name, tokens in produced.items():
        rows = [[*r.prompt, *tokens[r.id]] for r in requests]
        logits, _ = model(jnp.array(rows, jnp.int32))
        said = np.asarray(logits)[:, PROMPT_TOKENS - 1 : -1]
        chosen = np.array([tokens[r.id] for r in requests])
        short = said.max(axis=-1) - np.take_along_axis(said, chosen[..., None], -1)[..., 0]
        if not short.max() <= TOLERANCE[config.engine.dtype]:
            wrong.append(f"{name}: a token's logit is {short.max():.4f} below the largest")
    return wrong


if __name__ == "__main__":
    worker(measure)
