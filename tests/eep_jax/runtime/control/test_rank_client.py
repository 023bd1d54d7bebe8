"""A rank's end of the control channel finds its supervisor again, and says what it must."""

import asyncio
import contextlib
import json
import os
import threading
import time

import pytest
from aiohttp import web

from eep_jax.coordination.protocol import Commit, Fenced, Mode, Prepare, Refused, Status, Welcome
from eep_jax.runtime.control import messages, rank_client
from eep_jax.runtime.control.codec import decode, encode
from eep_jax.runtime.control.identity import host_id, start_ticks
from eep_jax.runtime.control.rank_client import Connected, ControlClient, ControlClientOptions
from eep_jax.runtime.control.server import ControlServer
from tests.support.factories import a_placement, a_view

TOKEN = "sixteen characters or more"
DEADLINE_S = 10.0
BYTES_MAX = 1 << 20


class FakeSupervisor:
    """Answers Hellos as it was told to, and keeps what it hears. Runs in a thread of its own."""

    def __init__(self, endpoint_file, answers):
        self._endpoint_file, self._answers = endpoint_file, list(answers)
        self.heard: list = []
        self.connections: list = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._runner = self._do(self._start())

    def _do(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(DEADLINE_S)

    async def _start(self):
        server = ControlServer(TOKEN, BYTES_MAX, self._on_message, lambda connection: None)
        runner = web.AppRunner(server.build_app(), shutdown_timeout=0.2)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        host, port = runner.addresses[0]
        self._endpoint_file.write_text(json.dumps({"host": host, "port": port}))
        return runner

    def _on_message(self, connection, message):
        self.heard.append(message)
        if isinstance(message, messages.Hello):
            self.connections.append(connection)
            if not message.incarnation:
                connection.send(self._answers.pop(0))

    def send(self, message) -> None:
        self._loop.call_soon_threadsafe(self.connections[-1].send, message)

    def hang_up(self) -> None:
        self._loop.call_soon_threadsafe(self.connections[-1].close)

    def of(self, kind: type) -> list:
        return [message for message in self.heard if isinstance(message, kind)]

    def end(self) -> None:
        self._do(self._runner.cleanup())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(DEADLINE_S)
        self._loop.close()


@pytest.fixture
def world(tmp_path):
    """`supervisor(*answers)` and `client()` start one each; all end with the test."""
    endpoint, started = tmp_path / "endpoint.json", contextlib.ExitStack()

    class World:
        def supervisor(self, *answers) -> FakeSupervisor:
            made = FakeSupervisor(endpoint, answers or (Welcome(incarnation=3),))
            started.callback(made.end)
            return made

        def client(self, **options) -> ControlClient:
            defaults = {"endpoint_file": endpoint, "token": TOKEN, "rank": 2, "run": "tiny"}
            limits = {"heartbeat_ms": 30, "message_bytes_max": BYTES_MAX}
            made = ControlClient(ControlClientOptions(**defaults | limits | options))
            made.start()
            started.callback(made.stop)
            return made

    with started:
        yield World()


def until(condition):
    ends_s = time.monotonic() + DEADLINE_S
    while not (found := condition()):
        assert time.monotonic() < ends_s, "it did not happen in time"
        time.sleep(0.005)
    return found


def received(client: ControlClient, kind: type):
    """Waits for the first message of a kind; drops those before it."""
    return until(lambda: next((m for m in client.receive() if isinstance(m, kind)), None))


def a_prepare(epoch: int) -> Prepare:
    return Prepare(
        epoch=epoch, view=a_view(), placement=a_placement(), moves=(), handles={}, reason="why"
    )


class TestIntroduction:
    def test_a_new_process_is_given_an_incarnation(self, world):
        supervisor, client = world.supervisor(Welcome(incarnation=3)), world.client()
        received(client, Connected)
        assert client.incarnation == 3
        (hello,) = supervisor.of(messages.Hello)
        assert (hello.rank, hello.incarnation, hello.run) == (2, 0, "tiny")

    def test_it_asks_again_until_it_is_let_in(self, world):
        refused = Refused(reason="not yet")
        supervisor, client = (
            world.supervisor(refused, refused, Welcome(incarnation=5)),
            world.client(),
        )
        received(client, Connected)
        assert len(supervisor.of(messages.Hello)) == 3 and client.incarnation == 5

    def test_one_that_is_fenced_learns_it(self, world):
        world.supervisor(*[Fenced(reason="too late")] * 50)
        client, reasons = world.client(), []
        client.on_turned_away = reasons.append
        assert received(client, Fenced).reason == "too late"
        until(lambda: "too late" in reasons)

    def test_it_says_which_process_it_is_and_on_which_host(self, world):
        supervisor = world.supervisor(*[Welcome(incarnation=3)] * 2)
        for options, host in (({}, host_id()), ({"host": "b", "mirrored": True}, "b")):
            received(world.client(**options), Connected)
            hello = supervisor.of(messages.Hello)[-1]
            assert (hello.pid, hello.ticks) == (os.getpid(), start_ticks(os.getpid()))
            assert (hello.host, hello.mirrored) == (host, bool(options))

    def test_it_finds_a_supervisor_by_its_address(self, world, tmp_path):
        supervisor = world.supervisor()
        endpoint = json.loads((tmp_path / "endpoint.json").read_text())
        address = f"{endpoint['host']}:{endpoint['port']}"
        received(world.client(endpoint_file=tmp_path / "none", address=address), Connected)
        assert supervisor.of(messages.Hello)

    def test_it_goes_over_to_a_new_supervisor_while_the_old_one_hangs_on(self, world):
        old, client = world.supervisor(), world.client()
        received(client, Connected)
        new = world.supervisor()
        until(lambda: new.of(messages.Hello))
        assert new.of(messages.Hello)[0].incarnation == 3 and old.of(messages.Hello)
        received(client, Connected)

    def test_it_may_be_there_before_its_supervisor(self, world, caplog):
        client = world.client()
        until(lambda: "no channel to the supervisor" in caplog.text)
        world.supervisor()
        received(client, Connected)

    def test_a_wrong_token_is_complained_of_once(self, world, caplog):
        world.supervisor()
        world.client(token="wrong")
        until(lambda: "401" in caplog.text)
        until(lambda: caplog.text.count("wrong token") >= 2)
        assert caplog.text.count("no channel to the supervisor") == 1


class TestHeartbeat:
    def test_every_status_has_a_higher_number_and_the_newest_state(self, world):
        supervisor, client = world.supervisor(), world.client()
        received(client, Connected)
        client.publish(Status(rank=2, incarnation=0, sequence=0, mode=Mode.SERVING, epoch=7))
        until(lambda: any(s.epoch == 7 for s in supervisor.of(Status)))
        count = len(supervisor.of(Status))
        until(lambda: len(supervisor.of(Status)) >= count + 3)
        found = supervisor.of(Status)
        assert [s.sequence for s in found] == sorted({s.sequence for s in found})
        assert {s.incarnation for s in found} == {3}
        assert {s.epoch for s in found[count:]} == {7}

    def test_a_process_that_cannot_go_on_says_why_before_it_ends(self, world):
        supervisor, client = world.supervisor(), world.client()
        client.fail("the disk is full")  # though it was not let in yet
        until(lambda: any(s.failure == "the disk is full" for s in supervisor.of(Status)))

    def test_an_engine_that_does_not_beat_is_reported_as_stalled(self, world):
        supervisor, client = world.supervisor(), world.client()
        received(client, Connected)
        until(lambda: supervisor.of(Status) and supervisor.of(Status)[-1].stalled_ms >= 50)
        high = supervisor.of(Status)[-1].stalled_ms
        client.beat()
        until(lambda: supervisor.of(Status)[-1].stalled_ms < high)


class TestMessages:
    def test_all_arrive_in_order_and_wake_the_engine(self, world):
        supervisor, client = world.supervisor(), world.client()
        received(client, Connected)
        arrivals = []
        client.on_arrival = lambda: arrivals.append(1)
        for epoch in range(20):
            supervisor.send(Commit(epoch=epoch))
        found = []
        until(lambda: found.extend(client.receive()) or len(found) == 20)
        assert [message.epoch for message in found] == list(range(20))
        assert len(arrivals) == 20

    def test_a_prepare_aborts_the_step_at_once(self, world):
        supervisor, client = world.supervisor(), world.client()
        received(client, Connected)
        aborted = []
        client.on_prepare = aborted.append
        supervisor.send(a_prepare(9))
        until(lambda: aborted == [9])
        assert received(client, Prepare) == a_prepare(9)

    def test_what_is_sent_arrives_in_order(self, world):
        supervisor, client = world.supervisor(), world.client()
        received(client, Connected)
        for number in range(50):
            client.send(messages.Telemetry(compilations=number, steps=0, discarded=0, moved={}))
        until(lambda: len(supervisor.of(messages.Telemetry)) == 50)
        assert [m.compilations for m in supervisor.of(messages.Telemetry)] == list(range(50))

    def test_without_a_channel_it_is_dropped_and_blocks_nobody(self, world):
        client = world.client()
        for _ in range(1_000):
            client.send(messages.Held(progress=()))
        assert client.receive() == []

    def test_a_malformed_one_costs_the_channel_and_not_the_rank(self, world, caplog):
        supervisor, client = world.supervisor(), world.client()
        received(client, Connected)
        supervisor.send(messages.Held(progress=()))  # not for ranks
        received(client, Connected)
        assert "unknown message 'Held'" in caplog.text

    def test_an_engine_that_reads_nothing_costs_the_channel_and_not_the_thread(
        self, world, caplog, monkeypatch
    ):
        monkeypatch.setattr(rank_client, "INCOMING_MAX", 5)
        supervisor, client = world.supervisor(), world.client()
        until(lambda: supervisor.connections and supervisor.of(Status))
        for epoch in range(10):
            supervisor.send(Commit(epoch=epoch))
        until(lambda: "left 5 messages unread" in caplog.text)
        client.receive()
        received(client, Connected)


class TestReconnect:
    def test_it_keeps_its_incarnation(self, world):
        supervisor, client = world.supervisor(), world.client()
        received(client, Connected)
        supervisor.hang_up()
        received(client, Connected)
        # A known process awaits no answer, so it may be connected before its Hello is read.
        until(lambda: len(supervisor.of(messages.Hello)) == 2)
        assert [h.incarnation for h in supervisor.of(messages.Hello)] == [0, 3]

    def test_it_finds_a_supervisor_on_another_port(self, world):
        first, client = world.supervisor(), world.client()
        received(client, Connected)
        second = world.supervisor()
        first.hang_up()
        received(client, Connected)
        client.send(messages.Held(progress=()))
        until(lambda: second.of(messages.Held))

    @pytest.mark.parametrize("text", ["", "{}", "not json", '{"host": "127.0.0.1", "port": 1}'])
    def test_an_unusable_endpoint_is_tried_again(self, world, tmp_path, caplog, text):
        (tmp_path / "endpoint.json").write_text(text)
        client = world.client()
        until(lambda: "no channel to the supervisor" in caplog.text)
        world.supervisor()
        received(client, Connected)


class TestEnd:
    def test_what_was_queued_is_still_sent(self, world):
        supervisor, client = world.supervisor(), world.client()
        received(client, Connected)
        for _ in range(100):
            client.send(messages.Held(progress=()))
        client.stop()
        until(lambda: len(supervisor.of(messages.Held)) == 100)
        assert not client._thread.is_alive()

    def test_it_ends_without_ever_having_been_connected(self, world):
        client = world.client()
        client.stop()
        assert not client._thread.is_alive()
        client.send(messages.Held(progress=()))  # harmless
        client.publish(Status(rank=2, incarnation=0, sequence=0, mode=Mode.ALONE))


def test_messages_for_ranks_and_for_the_supervisor_are_told_apart():
    assert not messages.TO_RANK.keys() & messages.TO_SUPERVISOR.keys()
    status = Status(rank=2, incarnation=1, sequence=1, mode=Mode.OFFERED)
    assert decode(encode(status), messages.TO_SUPERVISOR, BYTES_MAX) == status
