"""Promises of the host side of a window: abort and wake words, wherever the slabs are."""

import threading

import numpy as np
import pytest

from eep_jax.engine.lockstep import Lockstep
from eep_jax.heap.cuda.loopback import open_all_cuda
from eep_jax.heap.loopback import open_all
from pallas_kernels.window import WindowLayout, round_up
from tests.support.fake_cuda import put_fake_driver

DEADLINE_S, HOUR_MS = 60.0, 3_600_000
LAYOUT = WindowLayout(ranks=2, tokens=4, choices=2, hidden=8)


@pytest.fixture(params=["host memory", "device memory"])
def heaps(request, monkeypatch):
    put_fake_driver(monkeypatch)
    on_device = request.param == "device memory"
    opened = (open_all_cuda if on_device else open_all)(2, round_up(LAYOUT.window_bytes, 4096))
    yield opened
    for heap in opened:
        heap.release() if on_device else heap.close()


def test_an_abort_is_seen_on_the_host_and_carried_to_the_device(heaps, monkeypatch):
    lockstep, carried = Lockstep(LAYOUT, heaps[1]), []
    monkeypatch.setattr(heaps[1], "post_abort", lambda epoch: carried.append(epoch))
    for epoch in (3, 2, 5):
        lockstep.abort(epoch)
    assert lockstep.aborted_epoch == 5 and carried == [3, 5], "never back to an older epoch"
    assert Lockstep(LAYOUT, heaps[0]).aborted_epoch == 0
    assert heaps[1].control()[1, :4].view(np.uint32)[0] == 5


def test_a_peer_is_woken_at_the_round_of_the_pause_only(heaps):
    first, second = (Lockstep(LAYOUT, heap) for heap in heaps)
    doorbell = second.doorbell()
    first.wake_peers([1], 77)
    assert second.is_woken(77) and not second.is_woken(78) and second.doorbell() != doorbell
    assert not first.is_woken(77)
    second.forget_wakes()
    assert not second.is_woken(77)


def test_a_sleeper_ends_its_sleep_when_a_peer_wakes_it(heaps):
    first, second = (Lockstep(LAYOUT, heap) for heap in heaps)
    sleeper = threading.Thread(target=second.sleep, args=(second.doorbell(), HOUR_MS), daemon=True)
    sleeper.start()
    sleeper.join(0.05)
    assert sleeper.is_alive(), "nobody has woken it"
    first.wake_peers([1], 5)
    sleeper.join(DEADLINE_S)
    assert not sleeper.is_alive()


def test_clearing_flags_leaves_rows_and_peers_alone(heaps):
    sizes = LAYOUT.window_bytes
    for heap in heaps:
        heap.write(0, np.full(sizes, 255, np.uint8))
        heap.control()[heap.rank] = 255
    Lockstep(LAYOUT, heaps[0]).clear_flags()
    for name, region in LAYOUT.regions.items():
        if name in ("abort", "doorbell", "wake"):
            page = heaps[0].control()[0, region.offset : region.offset + region.bytes]
            cleared, found = name == "wake", page
        else:
            cleared, found = (
                name in ("ticket", "sent", "returned"),
                heaps[0].read(0, *_span(region)),
            )
            assert set(heaps[1].read(1, *_span(region))) == {255}
        assert set(found) == ({0} if cleared else {255}), name


def _span(region) -> tuple[int, int]:
    return region.offset, region.bytes


def test_more_ranks_than_a_page_has_words_are_refused(heaps):
    with pytest.raises(ValueError, match="wake words of 2000 ranks exceed"):
        Lockstep(WindowLayout(ranks=2000, tokens=1, choices=1, hidden=8), heaps[0])
