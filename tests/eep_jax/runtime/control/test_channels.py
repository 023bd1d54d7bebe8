"""A rank's channel is the newest connection of its process."""

import asyncio

from eep_jax.runtime.control import messages
from eep_jax.runtime.control.channels import Channels
from eep_jax.runtime.control.server import Connection


def a_connection(rank: int, incarnation: int = 1) -> Connection:
    hello = messages.Hello(rank=rank, incarnation=0, pid=7, ticks=9, host="a", run="tiny")
    return Connection(hello, incarnation, asyncio.Queue(8))


def sent(connection: Connection) -> list:
    """What was queued for the other end; None closes the connection."""
    return [connection.outgoing.get_nowait() for _ in range(connection.outgoing.qsize())]


def test_a_rank_that_calls_again_leaves_its_old_connection_without_a_say():
    channels, old, new = Channels(), a_connection(1), a_connection(1)
    channels.register(old)
    channels.register(new)
    assert sent(old) == [None] and channels.of(1) is new
    assert not channels.is_current(old) and not channels.remove(old), "it closes late"
    assert channels.is_current(new) and channels.remove(new)
    assert channels.of(1) is None and not channels.remove(new)


def test_what_is_meant_for_an_incarnation_reaches_no_other():
    channels, connection = Channels(), a_connection(1, incarnation=3)
    channels.register(connection)
    for incarnation in (2, 3, 4, None):
        channels.send(1, messages.Forget(id=str(incarnation)), incarnation)
    channels.send(0, messages.Forget(id="x"))  # nobody is there: it is lost
    assert sent(connection) == [messages.Forget(id="3"), messages.Forget(id="None")]


def test_requests_go_to_those_who_said_what_they_have():
    channels = Channels()
    for rank in range(3):
        channels.register(a_connection(rank))
    channels.of(0).settled = channels.of(2).settled = True
    assert channels.settled([3, 2, 1]) == [2]
    assert sorted(channels.hellos()) == [0, 1, 2]


def test_at_the_end_all_are_told():
    channels, connection = Channels(), a_connection(1)
    channels.register(connection)
    channels.shut_down()
    assert sent(connection) == [messages.Shutdown(), None]
