"""Promises of frames: they bring what kernels wrote, whole, before the flag, and nothing else."""

import dataclasses
import random

import hypothesis
import hypothesis.strategies as st
import ml_dtypes
import numpy as np
import pytest

from eep_jax.heap.mirror import frames
from eep_jax.heap.mirror.frames import HEADER, BadFrame, FrameCodec, Kind
from pallas_kernels.exchange.signals import parity
from pallas_kernels.window import WindowLayout

SIZES = WindowLayout(ranks=3, tokens=4, choices=2, hidden=8)
LAYOUTS = [
    SIZES,
    dataclasses.replace(SIZES, combine="per_rank"),
    dataclasses.replace(SIZES, row_dtype="bfloat16"),
    dataclasses.replace(SIZES, hidden=128, row_dtype="bfloat16", dispatch_dtype="float8_e4m3fn"),
]
ME, PEER = 1, 2
assert ml_dtypes.bfloat16  # numpy learns the name from it


class World:
    """The slabs of rank 1 and 2, each in its own process, and what rank 1 stages for rank 2."""

    def __init__(self, layout: WindowLayout, seed: int):
        draw = np.random.default_rng(seed)
        self.layout = layout
        slabs = draw.integers(0, 256, (3, layout.window_bytes), dtype=np.uint8)
        self.staging, self.mine, self.theirs = layout.views(slabs)
        self.codec, self.peer_codec = FrameCodec(layout, ME), FrameCodec(layout, PEER)
        for half in (0, 1):
            shape = (layout.tokens, layout.choices)
            self.staging["slots"][half, ME] = draw.integers(-1, 3, shape)
            self.mine["slots"][half, PEER] = draw.integers(-1, 3, shape)

    def frame(self, kind: Kind, number: int) -> bytes:
        pieces = self.codec.pack(kind, number, self.staging, self.mine, PEER)
        return b"".join(bytes(piece) for piece in pieces)

    def deliver(self, frame: bytes) -> None:
        kind, number, items, length = HEADER.unpack(frame[: HEADER.size])
        payload = memoryview(frame)[HEADER.size :]
        assert len(payload) == length == self.peer_codec.payload_bytes(kind, items)
        self.peer_codec.store(kind, number, items, payload, self.theirs, ME)

    def snapshot(self) -> dict[str, np.ndarray]:
        return {name: array.copy() for name, array in self.theirs.items()}


def wanted_items(world: World, kind: Kind, half: int) -> np.ndarray:
    if kind is Kind.SENT:
        return np.flatnonzero((world.staging["slots"][half, ME] >= 0).any(axis=1))
    wanted = world.mine["slots"][half, PEER] >= 0
    if world.layout.combine == "per_rank":
        wanted = wanted.any(axis=1)
    return np.flatnonzero(wanted.reshape(-1))


def bits(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).view(np.uint8)


@pytest.mark.parametrize("layout", LAYOUTS, ids=["choice", "rank", "bf16", "fp8"])
@pytest.mark.parametrize("kind", [Kind.SENT, Kind.RETURNED])
@hypothesis.given(seed=st.integers(0, 10_000), number=st.integers(0, 2**32 - 1))
@hypothesis.settings(max_examples=25)
def test_a_frame_brings_what_was_written_and_changes_nothing_else(layout, kind, seed, number):
    world = World(layout, seed)
    half, before = parity(number), world.snapshot()
    world.deliver(world.frame(kind, number))
    items = wanted_items(world, kind, half)
    data, flag = ("rows", "sent") if kind is Kind.SENT else ("returns", "returned")
    expected = before
    if kind is Kind.SENT:
        for name in ("votes", "slots", "weights"):
            expected[name][half, ME] = world.staging[name][half, ME]
    width = layout.tokens if kind is Kind.SENT or layout.combine == "per_rank" else -1
    sent = bits(world.staging[data][half, ME]).reshape(max(width, 0) or layout.tokens * 2, -1)
    bits_expected = expected[data].view(np.uint8)
    bits_expected[half, ME].reshape(sent.shape)[items] = sent[items]
    expected[flag][half, ME] = number
    for name, array in world.theirs.items():
        assert np.array_equal(bits(array), bits(expected[name])), name


def test_the_flag_is_posted_when_all_else_is_there(monkeypatch):
    world, posted = World(SIZES, 3), []
    frame = world.frame(Kind.SENT, 6)

    def checking(flag, value):
        items = wanted_items(world, Kind.SENT, 0)
        assert np.array_equal(
            bits(world.theirs["rows"][0, ME, items]), bits(world.staging["rows"][0, ME, items])
        )
        assert np.array_equal(world.theirs["slots"][0, ME], world.staging["slots"][0, ME])
        posted.append(value)

    monkeypatch.setattr(frames, "post", checking)
    world.deliver(frame)
    assert posted == [6]


def test_a_frame_is_a_copy_that_later_writes_do_not_reach():
    world = World(SIZES, 4)
    frame = world.codec.pack(Kind.SENT, 2, world.staging, world.mine, PEER)
    before = b"".join(bytes(piece) for piece in frame)
    world.staging["rows"][...], world.staging["slots"][...] = 0, -1
    assert b"".join(bytes(piece) for piece in frame) == before


def test_a_frame_that_comes_twice_or_late_leaves_what_came_once():
    world = World(SIZES, 5)
    old, new = world.frame(Kind.SENT, 4), None
    world.staging["rows"][0, ME] = 7
    new = world.frame(Kind.SENT, 8)
    for frame in (old, new):
        world.deliver(frame)
    once = world.snapshot()
    world.deliver(new)
    assert all(np.array_equal(bits(a), bits(once[n])) for n, a in world.theirs.items())
    world.deliver(old)
    assert world.theirs["sent"][0, ME] == 4, "its flag is its own round, which nobody waits for"


def test_a_wake_is_its_round_and_rings_the_bell():
    world = World(SIZES, 6)
    doorbell = int(world.theirs["doorbell"][0])
    world.deliver(world.frame(Kind.WAKE, 77))
    assert world.theirs["wake"][ME] == 77
    assert int(world.theirs["doorbell"][0]) == (doorbell + 1) & 0xFFFFFFFF


@hypothesis.given(seed=st.integers(0, 100_000))
@hypothesis.settings(max_examples=150)
def test_what_no_rank_sends_is_refused_or_stays_in_its_writers_places(seed):
    draw = random.Random(seed)
    world = World(SIZES, 7)
    before = world.snapshot()
    kind, items = draw.choice([0, 1, 2, 3, 9]), draw.choice([0, 1, 4, 8, 9, 1 << 20])
    try:
        length = world.peer_codec.payload_bytes(kind, items)
    except BadFrame:
        return
    assert length <= world.peer_codec.payload_bytes_max
    length = max(0, length + draw.choice([0, 0, 0, -1, 4]))
    payload = draw.choice([draw.randbytes(length), bytes(length)])
    number = draw.randrange(1 << 32)
    try:
        world.peer_codec.store(kind, number, items, memoryview(payload), world.theirs, ME)
    except BadFrame:
        after = before
    else:
        after = None
    for name, array in world.theirs.items():
        if after is not None:
            assert np.array_equal(bits(array), bits(after[name])), f"{name} was touched"
            continue
        if name == "doorbell":
            continue
        if array.ndim == 1 and name != "wake":
            assert np.array_equal(array, before[name]), f"{name} was touched"
            continue
        axis = 0 if name == "wake" else 1
        others = [r for r in range(SIZES.ranks) if r != ME]
        untouched = np.take(array, others, axis), np.take(before[name], others, axis)
        assert np.array_equal(*map(bits, untouched)), f"{name} of another writer was touched"


def test_item_numbers_beyond_the_window_are_refused():
    world = World(SIZES, 8)
    frame = bytearray(world.frame(Kind.RETURNED, 3))
    assert HEADER.unpack(frame[: HEADER.size])[2] > 0
    frame[HEADER.size : HEADER.size + 4] = (8).to_bytes(4, "little")
    before = world.snapshot()
    with pytest.raises(BadFrame, match="item 8 is not below 8"):
        world.deliver(bytes(frame))
    assert all(np.array_equal(bits(a), bits(before[n])) for n, a in world.theirs.items())
