"""Times of XLA's collectives for the bytes of an exchange: NCCL on GPUs, in one process.

- `all_to_all`: T rows to every rank, whether they have an expert there or not.
- `ragged_all_to_all`: those rows that dispatch sends, and no others; the sizes are known
  beforehand, which in a model they are not.
- `all_gather`: all rows to all ranks.

Each is checked against what must arrive, then timed as a chain: every repetition needs the result
of the one before, and a sample is (two runs - one run) / repetitions.
"""

import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.gpu_timing import Chained, Program, calling, measure
from benchmarks.processes import Out, worker
from benchmarks.static.engine import mesh_of
from benchmarks.static.exchanges import AXIS
from benchmarks.wide.exchange import Family, routing_of

NAMES = ("all_to_all", "ragged_all_to_all", "all_gather")


def repetition(name: str, ranks: int, tokens: int):
    """`(carry, sent, plan) -> carry` of one rank, inside `shard_map`.

    `carry [R T D]` is what it received last, `sent` the rows that it sends: `[R T D]` for
    `all_to_all` and ragged, by destination. `plan [1 4 R]` are ragged's offsets and sizes.
    """
    if name == "all_to_all":
        return lambda carry, sent, plan: lax.all_to_all(carry, AXIS, 0, 0)
    if name == "all_gather":

        def gather(carry, sent, plan):
            own = lax.dynamic_index_in_dim(carry, lax.axis_index(AXIS), 0, keepdims=False)
            return lax.all_gather(own, AXIS)

        return gather

    def ragged(carry, sent, plan):
        starts, sizes, targets, comes = plan[0]
        flat = lambda rows: rows.reshape(ranks * tokens, -1)
        out = lax.ragged_all_to_all(
            flat(sent), flat(carry), starts, sizes, targets, comes, axis_name=AXIS
        )
        return out.reshape(carry.shape)

    return ragged


def plan_of(slots: np.ndarray, slots_per_rank: int) -> np.ndarray:
    """For slots `[R T K]`, of each rank: where its rows to every rank start, how many they are,
    where they go there, and how many come from every rank: int32 `[R 4 R]`.

    Rows to rank d are the first of `sent[d]`; those of rank s arrive at the start of `carry[s]`.
    """
    ranks, tokens, _ = slots.shape
    owner = np.where(slots >= 0, slots // slots_per_rank, -1)
    sizes = np.stack([(owner == rank).any(-1).sum(-1) for rank in range(ranks)], axis=1)  # [s, d]
    regions = np.broadcast_to(np.arange(ranks) * tokens, (ranks, ranks))
    targets = np.broadcast_to(np.arange(ranks)[:, None] * tokens, (ranks, ranks))
    return np.stack([regions, sizes, targets, sizes.T], axis=1).astype(np.int32)


def chain_of(name: str, mesh, ranks: int, tokens: int, repetitions: int):
    """`(carry, sent, plan) -> carry` over the mesh, all arrays split by rank."""
    one = repetition(name, ranks, tokens)

    def run(carry, sent, plan):
        return lax.fori_loop(0, repetitions, lambda _, c: one(c, sent, plan), carry)

    spread = P(AXIS)
    return jax.shard_map(run, mesh=mesh, in_specs=(spread,) * 3, out_specs=spread, check_vma=False)


def rows_of(ranks: int, tokens: int, hidden: int, dtype) -> np.ndarray:
    """Small numbers that encode source and destination: `[R source, R destination, T, D]`."""
    source, target, token = np.ogrid[:ranks, :ranks, :tokens]
    value = (source * 16 + target + token % 8 / 8).astype(np.float32)
    return np.broadcast_to(value[..., None].astype(dtype), (ranks, ranks, tokens, hidden))


def check(name: str, got: np.ndarray, rows: np.ndarray, plan: np.ndarray) -> None:
    """Raises RuntimeError unless `got [R R T D]`, after one repetition, is what must arrive."""
    ranks = len(rows)
    for here in range(ranks):
        for source in range(ranks):
            wanted = rows[source, here] if name != "all_gather" else rows[source, source]
            count = plan[here, 3, source] if name == "ragged_all_to_all" else rows.shape[2]
            if not np.array_equal(got[here, source, :count, :1], wanted[:count, :1]):
                raise RuntimeError(f"{name}: rank {here} has other rows of rank {source}")


def measure_size(family: Family, tokens: int, mesh, samples: int, out: Out, names) -> None:
    ranks, dtype = family.ranks, jnp.dtype(family.row_dtype)
    plan = plan_of(routing_of(family, tokens, "uniform"), family.slots_per_rank)
    rows = rows_of(ranks, tokens, family.hidden, dtype)
    split = NamedSharding(mesh, P(AXIS))
    put = lambda array: jax.device_put(array.reshape(-1, *array.shape[2:]), split)
    sent = put(rows)
    shared = jax.device_put(plan, split)
    nothing = put(np.zeros_like(rows))
    repetitions = max(8, min(50, int(100e6 // (ranks * tokens * family.hidden * dtype.itemsize))))
    runs = {}
    for name in names:
        try:
            start = nothing if name == "ragged_all_to_all" else sent
            once = compiled(chain_of(name, mesh, ranks, tokens, 1), (start, sent, shared))
            found = np.asarray(once(start, sent, shared)[..., :1])
            check(name, found.reshape(*rows.shape[:3], 1), rows, plan)
            run = compiled(chain_of(name, mesh, ranks, tokens, repetitions), (start, sent, shared))
            runs[name] = Chained(calling(run, sent, shared), start, repetitions)
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
            print(f"{name} {tokens}: {text}", file=sys.stderr, flush=True)
            out.write(
                kind="failure", family="collectives", what=f"{name} {tokens}", error=text[:600]
            )
    for name, timing in measure(runs, samples).items():
        remote = int(plan[:, 1].sum() - np.trace(plan[:, 1])) // ranks * family.layout.row_bytes
        dense = (ranks - 1) * tokens * family.hidden * dtype.itemsize
        sent_bytes = remote if name == "ragged_all_to_all" else dense
        out.write(
            kind="collective",
            name=name,
            tokens=tokens,
            samples_us=list(timing.samples_us),
            bytes=sent_bytes,
        )


def compiled(run, arguments):
    return Program(run, arguments).trace().lower().compile()


def measure_all(directory: pathlib.Path, rank: int, job: dict) -> None:
    fields = job["families"][0]
    family = Family(**{**fields, "tokens": tuple(fields["tokens"])})
    if (found := len(jax.devices())) < family.ranks:
        raise RuntimeError(f"collectives of {family.ranks} ranks need as many devices, not {found}")
    mesh, out = mesh_of(jax.devices()[: family.ranks]), Out(directory / "found.collectives.jsonl")
    names = [n for n in NAMES if n != "ragged_all_to_all" or job["platform"] == "gpu"]
    for tokens in family.tokens:
        measure_size(family, tokens, mesh, job["samples"], out, names)


if __name__ == "__main__":
    worker(measure_all)
