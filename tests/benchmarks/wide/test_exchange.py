"""The programs that ranks of `bench_wide` run, lowered for an H100; and what is counted of them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.bench_wide import families_of
from benchmarks.processes import Machine
from benchmarks.wide import clock, collectives
from benchmarks.wide.exchange import (
    FP8,
    Family,
    Rank,
    programs_of,
    remote_bytes,
    repetitions_of,
    routing_of,
)
from launch.errors import UsageError
from tests.support.lowering import a_call, kernels, like, on_h100

BF16 = Family(ranks=4, tokens=(4, 16), choices=4, hidden=256, experts=32)
FP8_SUMS = dataclasses.replace(BF16, combine="per_rank", dispatch_dtype=FP8)
KERNELS = {"dispatch": 1, "combine": 2, "combine_home": 1}  # of one repetition


def lowered(program) -> str:
    with on_h100():
        return program.trace().lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("family", [BF16, FP8_SUMS], ids=lambda f: f.combine)
def test_all_programs_of_a_rank_lower_for_an_h100(family):
    rank = Rank(family, 1, slab_bytes=1 << 24)
    with on_h100():
        programs = programs_of(rank, 16, a_call(4), like((1, 4096), np.uint8), 8)
    per_choice = family.combine == "per_choice"
    home = {"combine_home"} if per_choice else set()
    assert set(programs) == {"check", "dispatch", "combine"} | home
    for name, program in programs.items():
        found = kernels(lowered(program))
        if name == "check":
            assert len(found) >= 3
            continue
        # One repetition before the clock is read, UNROLLED in the loop, and two readings.
        wanted = KERNELS[name] * (1 + clock.UNROLLED) + 2
        assert len(found) == wanted, name
        assert sum("globaltimer" in text and "stamp" in text for text in found) == 2


def test_a_dispatch_sends_no_row_to_itself_and_one_to_each_other_rank():
    slots = np.array([[[0, 1, 5]], [[0, 2, 3]], [[4, 5, -1]]])  # two slots a rank
    family = Family(ranks=3, tokens=(1,), choices=3, hidden=64, experts=6)
    row = family.layout.row_bytes
    # Rank 0 sends a row to rank 2, rank 1 one to rank 0, rank 2 none; home: 1, 1 and 0 of them.
    assert remote_bytes(slots, family).dispatch == row
    assert remote_bytes(slots, family).combine == row
    both = np.array([[[2, 3, 4]], [[2, 3, 0]], [[2, 2, 3]]])
    assert remote_bytes(both, family).dispatch == 2 * row
    assert remote_bytes(both, family).combine == 5 * row, "rank 1 answers five choices of others"
    sums = dataclasses.replace(family, combine="per_rank")
    assert remote_bytes(both, sums).combine == 2 * row


@given(st.integers(1, 8), st.integers(1, 6), st.integers(0, 99), st.sampled_from(["uniform"]))
@settings(max_examples=30, deadline=None)
def test_bytes_are_those_of_counting_row_by_row(ranks, tokens, seed, routing):
    family = Family(ranks=ranks, tokens=(tokens,), choices=4, hidden=64, experts=8 * ranks)
    slots = routing_of(family, tokens, routing, seed)
    sent, home = np.zeros(ranks), np.zeros(ranks)
    for source in range(ranks):
        for token in range(tokens):
            owners = [slot // 8 for slot in slots[source, token]]
            sent[source] += len(set(owners) - {source})
            for owner in owners:
                home[owner] += owner != source
    found = remote_bytes(slots, family)
    assert (found.dispatch, found.combine) == (sent.max() * 128, home.max() * 128)


def test_fewer_repetitions_where_ranks_take_turns():
    assert repetitions_of(1 << 30, shared=False) == repetitions_of(100, shared=True) == 8
    assert repetitions_of(0, shared=False) == 64
    assert repetitions_of(2_000_000, shared=False) == 28


def test_a_chain_reads_the_clock_around_all_but_its_first_repetition():
    seen = []

    def step(carry, word):
        round_, suspicion, vote = carry
        count = lambda s: seen.append("step") or s
        kind = jax.ShapeDtypeStruct(suspicion.shape, suspicion.dtype)
        return round_ + word, jax.pure_callback(count, kind, suspicion), vote

    carry = (jnp.uint32(3), jnp.zeros(2, jnp.int32), jnp.uint32(1))
    run = jax.jit(clock.timed_chain(step, 8))
    (round_, suspicion, _), begin, end = run(carry, jnp.uint32(1))
    assert int(round_) == 3 + 9 and len(seen) == 9 and not np.asarray(suspicion).any()
    assert clock.microseconds(np.asarray(begin), np.asarray(end), 8) > 0
    with pytest.raises(ValueError, match="multiple of 4"):
        clock.timed_chain(step, 6)


def test_a_carry_of_the_clocks_low_half_is_no_matter():
    begin, end = np.array([2**32 - 100_000, 1]), np.array([200_000, 2])
    assert clock.microseconds(begin, end, 10) == 30.0


class TestFamilies:
    def test_a_gpu_has_one_in_bf16_and_one_in_fp8(self):
        gpu = Machine("gpu", 2, ("0", "1"))
        first, second = families_of(gpu, (1, 128), 7168, 256, 8)
        assert (first.row_dtype, first.combine, first.slots_per_rank) == (
            "bfloat16",
            "per_choice",
            128,
        )
        assert (second.dispatch_dtype, second.combine) == (FP8, "per_rank")

    @pytest.mark.parametrize(
        "sizes, told",
        [((1, 64, 256, 8), "multiple of 128"), ((1, 128, 4, 8), "--top_k=8 of --experts=4")],
    )
    def test_what_kernels_do_not_take_is_refused(self, sizes, told):
        tokens, *rest = sizes
        with pytest.raises(UsageError, match=told):
            families_of(Machine("gpu", 2, ("0",)), (tokens,), *rest)


class TestCollectives:
    R, T, D = 3, 4, 8

    def _mesh(self):
        return jax.sharding.AbstractMesh((self.R,), (collectives.AXIS,))

    @pytest.mark.parametrize("name", collectives.NAMES)
    def test_chains_lower_for_gpus(self, name):
        split = jax.sharding.NamedSharding(self._mesh(), jax.P(collectives.AXIS))
        of = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=split)
        rows = of((self.R * self.R, self.T, self.D), jnp.bfloat16)
        run = collectives.chain_of(name, self._mesh(), self.R, self.T, 5)
        traced = jax.jit(run).trace(rows, rows, of((self.R, 4, self.R), jnp.int32))
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
        assert name in text and "while" in text

    @given(st.integers(0, 99), st.integers(1, 4))
    @settings(max_examples=30, deadline=None)
    def test_ragged_moves_the_rows_that_dispatch_sends(self, seed, ranks):
        family = Family(ranks=ranks, tokens=(5,), choices=2, hidden=64, experts=4 * ranks)
        slots = routing_of(family, 5, "skewed", seed)
        plan = collectives.plan_of(slots, 4)
        starts, sizes, targets, comes = np.moveaxis(plan, 1, 0)
        for rank in range(ranks):
            for peer in range(ranks):
                wanted = len({t for t in range(5) if (slots[rank, t] // 4 == peer).any()})
                assert sizes[rank, peer] == comes[peer, rank] == wanted
                assert starts[rank, peer] == 5 * peer and targets[rank, peer] == 5 * rank
        apart = sizes.sum(1) - np.diag(sizes)
        assert apart.max() * family.layout.row_bytes == remote_bytes(slots, family).dispatch

    def test_rows_that_did_not_arrive_are_found(self):
        rows = collectives.rows_of(2, 3, 4, np.float32)
        plan = np.zeros((2, 4, 2), np.int32)
        plan[:, 3] = [[3, 2], [1, 3]]
        right = np.moveaxis(rows, 0, 1)
        for name in ("all_to_all", "ragged_all_to_all"):
            collectives.check(name, right, rows, plan)
        wrong = right.copy()
        wrong[1, 0, 2] = -1
        collectives.check("ragged_all_to_all", wrong, rows, plan)  # only one row was sent
        with pytest.raises(RuntimeError, match="rank 1 has other rows of rank 0"):
            collectives.check("all_to_all", wrong, rows, plan)
