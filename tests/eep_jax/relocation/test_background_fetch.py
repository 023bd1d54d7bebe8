"""Promises of fetching while steps run: the first source that works, and the caller never waits."""

import threading
import time

import pytest

from eep_jax.placement.placement import EMPTY
from eep_jax.relocation.background_fetch import BackgroundFetch
from tests.eep_jax.relocation.test_executor import CHECKPOINT, PEER, World, bring
from tests.support.models import fill_bank

DEADLINE_S = 60.0


@pytest.fixture(params=[False, True], ids=["digests", "slots are checked"])
def world(pristine_checkpoint, request):
    made = World(pristine_checkpoint, checks=request.param, deadline_ms=1_000)
    made.done = threading.Event()
    made.background = BackgroundFetch(made.executor, made.done.set)
    return made


def finish(world, move) -> bool:
    ends_s = time.monotonic() + DEADLINE_S
    while time.monotonic() < ends_s:
        if (came := world.background.advance(move)) is not None:
            return came
        world.done.wait(0.01)
    raise AssertionError("it never ended")


def attach(world, experts) -> None:
    fill_bank(world.peer, experts, world.right)
    world.heaps[0].attach(1, world.heaps[1].export())


def test_a_peer_is_read_and_its_digest_compared(world):
    attach(world, (EMPTY, EMPTY, 3, EMPTY))
    assert finish(world, bring(3, 1, (PEER, 1, 2), CHECKPOINT))
    world.check((EMPTY, 3, EMPTY, EMPTY))
    assert world.executor.moved == {"peer": 1} and world.checkpoint.read == []


def test_a_source_that_is_wrong_means_the_next(world):
    attach(world, (EMPTY, EMPTY, 2, EMPTY))
    assert finish(world, bring(3, 1, (PEER, 1, 2), CHECKPOINT))
    world.check((EMPTY, 3, EMPTY, EMPTY))
    assert world.executor.moved == {"checkpoint": 1}


def test_no_source_leaves_the_slot_as_it_was(world):
    attach(world, (EMPTY, EMPTY, 2, EMPTY))
    assert not finish(world, bring(3, 1, (PEER, 1, 2)))
    world.check((EMPTY,) * 4)


def test_the_caller_never_waits_for_storage(world, monkeypatch):
    hang, read = threading.Event(), []
    hangs = lambda experts: hang.wait(DEADLINE_S) or read.append(experts)
    monkeypatch.setattr(world.checkpoint, "read_experts", hangs)
    move = bring(3, 1, CHECKPOINT)
    assert world.background.advance(move) is None
    assert not read, "it waited until storage gave up"
    assert not finish(world, move)
    hang.set()


def test_a_move_that_was_given_up_writes_nothing(world):
    attach(world, (0, EMPTY, 3, EMPTY))
    if world.slot_check is not None:
        return  # the copy is complete after one call
    assert world.background.advance(bring(3, 1, (PEER, 1, 2))) is None
    assert world.done.wait(DEADLINE_S)
    assert finish(world, bring(0, 2, (PEER, 1, 0)))
    world.check((EMPTY, EMPTY, 0, EMPTY))
