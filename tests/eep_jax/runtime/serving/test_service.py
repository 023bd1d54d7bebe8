"""The front of the request table: several choices of one client start together, or none does."""

import asyncio
import dataclasses

import pytest

from eep_jax.engine.request import Shaping
from eep_jax.errors import QueueFull
from eep_jax.runtime.http.completion import CompletionLimits, parse_requests
from eep_jax.runtime.serving.contract import KeyConflict
from eep_jax.runtime.serving.request_table import RequestTable
from eep_jax.runtime.serving.service import CompletionFrontend

LIMITS = CompletionLimits(model="tiny", context_tokens=32)


class World:
    """A frontend over a table with room for three requests."""

    def __init__(self):
        self.table = RequestTable(queue_max=3, finished_max=8, per_rank_max=8)
        self.accepted = []
        self.frontend = CompletionFrontend(
            self.table, frozenset({9}), lambda: "", self.accepted.append, lambda entry: None
        )

    def submit(self, key: str | None = None, **fields) -> list:
        sent = {"model": "tiny", "prompt": "Hi"} | fields
        return self.frontend.submit_all(parse_requests(sent, LIMITS), key)


def test_choices_that_do_not_all_fit_start_none():
    world = World()
    world.submit(n=2)
    with pytest.raises(
        QueueFull, match="2 requests are being served, the maximum is 3, and 2 more"
    ):
        world.submit(n=2)
    assert len(world.accepted) == 2
    world.submit()
    with pytest.raises(QueueFull):
        world.submit()


def test_a_repeated_key_finds_every_choice_again_even_where_nothing_more_fits():
    world = World()
    first = world.submit("k", n=3, seed=1)
    assert [stream.id for stream in world.submit("k", n=3, seed=1)] == [s.id for s in first]
    assert len({stream.id for stream in first}) == 3 and len(world.accepted) == 3
    with pytest.raises(KeyConflict):
        world.submit("k", n=2, seed=1)
    with pytest.raises(KeyConflict):
        world.submit("k", n=3, seed=1, top_k=5)


def test_seeds_count_up_and_what_shapes_tokens_reaches_the_rank():
    world = World()
    world.submit(n=2, seed=2**63 - 1, presence_penalty=1, stop_token_ids=[3])
    requests = [entry.request for entry in world.accepted]
    assert [request.seed for request in requests] == [2**63 - 1, 2**63]
    wanted = Shaping(presence_penalty=1.0, stop_token_ids=(3,))
    assert {request.shaping for request in requests} == {wanted}


@pytest.mark.parametrize("last", [9, 3])
def test_a_token_that_ends_a_text_is_no_part_of_it(last):
    world = World()
    (stream,) = world.submit(stop_token_ids=[3])
    (entry,) = world.accepted
    entry.produced, entry.finish = [65, last], "stop"

    async def read():
        return [progress async for progress in stream]

    (progress,) = asyncio.run(read())
    assert (progress.tokens, progress.finish_reason) == ((65,), "stop")
    entry.produced, entry.finish = [65, last], "length"
    (progress,) = asyncio.run(read())
    assert progress.tokens == (65, last)


def test_a_body_is_compared_without_what_does_not_change_tokens():
    world = World()
    (first,) = world.submit("k", seed=1)
    (again,) = world.submit("k", seed=1, stream=True)
    assert again.id == first.id
    assert dataclasses.asdict(world.accepted[0].request)["shaping"] == dataclasses.asdict(Shaping())
