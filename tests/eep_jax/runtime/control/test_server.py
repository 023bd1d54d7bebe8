"""The control channel admits ranks of this run with the token, and refuses all else aloud."""

import asyncio
import dataclasses
import logging

import aiohttp
import pytest

from eep_jax.coordination.protocol import Welcome
from eep_jax.runtime.control import messages, server
from eep_jax.runtime.control.codec import encode
from tests.support.control_world import TOKEN, a_world, expected_text, story
from tests.support.factories import a_status
from tests.support.fake_rank import connection_to, hello_of, receive, start_body

BYTES_MAX = 50_000


@pytest.fixture
def body():
    process = start_body()
    yield process
    process.kill()
    process.wait(10)


def hello(body, rank: int = 1, run: str = "tiny", **changes) -> bytes:
    return encode(dataclasses.replace(hello_of(rank, body.pid, run), **changes))


class Door:
    """One stranger at the door of a cluster that serves with rank 0, while rank 1 is away."""

    def __init__(self, tmp_path, caplog):
        self.tmp_path, self.caplog = tmp_path, caplog

    async def refuses(self, frames, expected_in_log: str) -> None:
        """The channel is closed after these frames, the reason is logged, and others are served."""
        self.caplog.set_level(logging.INFO, "eep_jax")
        async with a_world(self.tmp_path, serve={"message_bytes_max": BYTES_MAX}) as world:
            await world.form()
            await world.ranks[1].close()
            await world.until(lambda: world.supervisor.service.status()["epoch"] == 2)
            async with connection_to(self.tmp_path, TOKEN) as socket:
                for frame in frames:
                    if isinstance(frame, str):
                        await socket.send_str(frame)
                    else:
                        await socket.send_bytes(frame)
                with pytest.raises(ConnectionError):
                    while True:  # an answer to what came before may still be under way
                        await receive(socket)
            assert expected_in_log in self.caplog.text
            assert await world.complete(max_tokens=4) == (200, expected_text("Hi", 4))


@pytest.fixture
def door(tmp_path, caplog):
    return Door(tmp_path, caplog)


class TestToken:
    @pytest.mark.parametrize("token", [None, "", TOKEN + "x", TOKEN[:-1], "wrong"])
    @story
    async def test_without_the_token_it_answers_401_and_says_so(self, tmp_path, caplog, token):
        async with a_world(tmp_path) as world:
            await world.start_supervisor()
            with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
                async with connection_to(tmp_path, token):
                    pass
            assert refused.value.status == 401
            assert "wrong token" in caplog.text
            assert TOKEN not in caplog.text
            world.start_rank(0), world.start_rank(1)
            await world.until(world.is_whole)


class TestFirstMessage:
    def test_must_be_binary(self, door):
        asyncio.run(door.refuses(["hello"], "a TEXT frame, expected a binary one"))

    def test_must_be_msgpack(self, door):
        asyncio.run(door.refuses([b"\xc1"], "not msgpack"))

    def test_must_be_a_hello(self, door):
        frame = encode(a_status(1))
        asyncio.run(door.refuses([frame], "the first message is Status, expected Hello"))

    def test_must_be_of_this_run(self, door, body):
        asyncio.run(door.refuses([hello(body, run="other")], "rank 1 runs 'other', this is 'tiny'"))

    @pytest.mark.parametrize("rank", [-1, 2])
    def test_must_name_a_rank_that_there_is(self, door, body, rank):
        asyncio.run(door.refuses([hello(body, rank)], f"rank {rank} is not in 0..1"))

    @pytest.mark.parametrize("pid", [0, -1, 1 << 40])
    def test_must_name_a_process(self, door, body, pid):
        asyncio.run(door.refuses([hello(body, pid=pid)], f"its pid is {pid}"))

    def test_must_come_in_time(self, door, monkeypatch):
        monkeypatch.setattr(server, "HELLO_TIMEOUT_S", 0.05)
        asyncio.run(door.refuses([], "no Hello in time"))


class TestLaterMessages:
    def test_of_the_wrong_form_close_the_channel(self, door, body):
        frames = [hello(body), b"\x93\x01\x02\x03"]
        asyncio.run(door.refuses(frames, "refused a message of rank 1: expected [name"))

    def test_meant_for_ranks_close_the_channel(self, door, body):
        frames = [hello(body), encode(Welcome(incarnation=3))]
        asyncio.run(door.refuses(frames, "unknown message 'Welcome'"))

    def test_that_are_too_large_close_the_channel(self, door, body):
        frames = [hello(body), b"x" * (BYTES_MAX + 1)]
        asyncio.run(door.refuses(frames, "exceeds limit 50000"))

    @pytest.mark.parametrize("changes", [{"rank": 0}, {"incarnation": 1}, {"incarnation": 3}])
    def test_of_another_rank_or_incarnation_close_the_channel(self, door, body, changes):
        values = {"rank": 1, "incarnation": 2, **changes}
        frames = [hello(body), encode(a_status(**values))]
        wanted = f"a Status of rank {values['rank']} incarnation {values['incarnation']}"
        asyncio.run(door.refuses(frames, wanted))

    @pytest.mark.parametrize(
        ("changes", "reason"),
        [({"contents": (1, 2)}, "2 slots, expected 4"), ({"accused": (2,)}, "accused ranks (2,)")],
    )
    def test_that_do_not_fit_the_cluster_close_the_channel(self, door, body, changes, reason):
        frames = [hello(body), encode(a_status(1, incarnation=2, **changes))]
        asyncio.run(door.refuses(frames, reason))

    def test_must_not_introduce_the_rank_again(self, door, body):
        frames = [hello(body), hello(body)]
        asyncio.run(door.refuses(frames, "introduced itself twice"))

    def test_must_wait_for_the_answer_to_the_hello(self, door, body):
        frames = [hello(body, rank=0), encode(a_status(0))]  # rank 0 is served by another
        asyncio.run(door.refuses(frames, "before the Hello was answered"))


class TestSending:
    @story
    async def test_a_peer_that_takes_nothing_is_cut_off_and_blocks_nobody(
        self, tmp_path, caplog, monkeypatch, body
    ):
        monkeypatch.setattr(server, "WRITE_DEADLINE_S", 0.1)
        async with a_world(tmp_path) as world:
            await world.form()
            await world.ranks[1].close()
            await world.until(lambda: world.supervisor.service.status()["epoch"] == 2)
            async with connection_to(tmp_path, TOKEN) as socket:
                await socket.send_bytes(hello(body))
                await receive(socket)
                socket._conn.transport.pause_reading()
                connection = world.supervisor.channels.of(1)
                large = messages.Forget(id="x" * 1_000_000)
                for _ in range(40):
                    connection.send(large)
                assert await world.complete(max_tokens=4) == (200, expected_text("Hi", 4))
                await world.until(lambda: world.supervisor.channels.of(1) is None)
                socket._conn.transport.abort()
            assert "it took nothing for 0.1 s" in caplog.text

    @story
    async def test_a_queue_that_overflows_closes_the_channel(self, tmp_path, caplog, body):
        async with a_world(tmp_path) as world:
            await world.start_supervisor()
            async with connection_to(tmp_path, TOKEN) as socket:
                await socket.send_bytes(hello(body))
                await receive(socket)
                connection = world.supervisor.channels.of(1)
                for _ in range(server.OUTGOING_MAX + 1):
                    connection.send(messages.Forget(id="x"))
                assert "does not read its channel" in caplog.text
                with pytest.raises(ConnectionError):
                    while True:
                        await receive(socket)
