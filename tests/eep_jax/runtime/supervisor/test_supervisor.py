"""The supervisor with scripted ranks: what clients see while ranks and supervisors come and go."""

import asyncio
import contextlib
import os
import subprocess
import sys

import aiohttp
import pytest

from eep_jax.coordination.protocol import Fenced, Mode, Refused, Welcome
from eep_jax.coordination.scaling import ScaleRequest
from eep_jax.engine.request import Progress
from eep_jax.errors import InvalidMove
from eep_jax.runtime.control import messages
from eep_jax.runtime.control.codec import encode
from eep_jax.runtime.control.endpoint import JOURNAL
from eep_jax.runtime.history.journal import replay
from eep_jax.runtime.processes import local
from eep_jax.runtime.supervisor.supervisor import Supervisor
from tests.support.control_world import TOKEN, a_world, expected_text, story, texts
from tests.support.fake_rank import connection_to, hello_of, receive


class TestServing:
    @story
    async def test_all_ranks_form_the_first_epoch_and_serve(self, tmp_path):
        async with a_world(tmp_path) as world:
            await world.form()
            status = world.supervisor.service.status()
            assert status["epoch"] == 1
            assert status["experts"]["missing"] == []
            assert [r["incarnation"] for r in status["ranks"]] == [1, 1]
            assert await world.complete(max_tokens=20) == (200, expected_text("Hi", 20))

    @story
    async def test_no_request_is_taken_before_all_ranks_are_ready(self, tmp_path):
        async with a_world(tmp_path) as world:
            await world.start_supervisor()
            world.start_rank(0)
            status, message = await world.complete()
            assert (status, "starting" in message) == (503, True)
            healthy, facts = world.supervisor.service.health()
            assert (healthy, facts["status"]) == (False, "forming")

    @story
    async def test_without_coverage_requests_are_refused_until_a_rank_returns(self, tmp_path):
        async with a_world(tmp_path, slots_per_rank=2) as world:
            await world.form()
            await world.ranks[1].close()
            await world.until(lambda: world.supervisor.state.blocked)
            status, message = await world.complete()
            assert (status, "no expert coverage" in message) == (503, True)
            world.start_rank(1)
            await world.until(world.is_whole)
            assert await world.complete(max_tokens=4) == (200, expected_text("Hi", 4))

    @story
    async def test_a_full_queue_answers_429(self, tmp_path):
        async with a_world(tmp_path, serve={"queue_max": 2}) as world:
            await world.form()
            for rank in world.ranks.values():
                rank.pace.clear()
            waiting = [asyncio.create_task(world.complete(seed=n)) for n in range(2)]
            await world.until(lambda: world.supervisor.requests.counts["accepted"] == 2)
            status, message = await world.complete()
            assert (status, "the maximum" in message) == (429, True)
            for rank in world.ranks.values():
                rank.pace.set()
            assert [status for status, _ in await asyncio.gather(*waiting)] == [200, 200]

    @story
    async def test_a_client_that_goes_away_frees_its_rank(self, tmp_path):
        async with a_world(tmp_path) as world:
            await world.form()
            async with world.completion(max_tokens=500, stream=True) as response:
                await anext(texts(response))
            await world.until(lambda: not any(r.requests for r in world.ranks.values()))
            assert world.supervisor.requests.counts["cancelled"] == 1


class TestShutdown:
    """An answer that is under way is finished, or ends with an error that says why."""

    @contextlib.asynccontextmanager
    async def under_way(self, tmp_path, **serve):
        async with a_world(tmp_path, serve=serve) as world:
            await world.form()
            async with world.completion(max_tokens=100, stream=True) as response:
                stream = texts(response)
                seen = await anext(stream)
                for rank in world.ranks.values():
                    rank.pace.clear()
                yield world, stream, seen

    @story
    async def test_it_takes_no_new_work_and_finishes_what_is_under_way(self, tmp_path):
        async with self.under_way(tmp_path, shutdown_timeout_s=60) as (world, stream, seen):
            stopping = asyncio.create_task(world.stop_supervisor())
            await world.until(lambda: world.supervisor.service.health()[1]["status"] == "draining")
            assert not world.supervisor.service.health()[0]
            status, message = await world.complete()
            assert status == 503 and "shutting down" in message
            assert not stopping.done()
            for rank in world.ranks.values():
                rank.pace.set()
            assert seen + "".join([text async for text in stream]) == expected_text("Hi", 100)
            await stopping

    @story
    async def test_an_answer_that_takes_too_long_ends_with_an_error(self, tmp_path):
        async with self.under_way(tmp_path, shutdown_timeout_s=0.1) as (world, stream, _):
            stopping = asyncio.create_task(world.stop_supervisor())
            with pytest.raises(AssertionError, match="shut down before this answer was complete"):
                async for _ in stream:
                    pass
            await stopping

    @story
    async def test_a_second_wish_waits_for_no_answer(self, tmp_path):
        async with self.under_way(tmp_path, shutdown_timeout_s=600) as (world, stream, _):
            stopping = asyncio.create_task(world.stop_supervisor())
            await world.until(lambda: world.supervisor.service.health()[1]["status"] == "draining")
            world.hurry.set()
            with pytest.raises(AssertionError, match="shut down before this answer was complete"):
                async for _ in stream:
                    pass
            await stopping

    @story
    async def test_a_stream_says_that_it_lives_while_nothing_comes(self, tmp_path):
        async with a_world(tmp_path, serve={"keep_alive_ms": 20}) as world:
            await world.form()
            for rank in world.ranks.values():
                rank.pace.clear()
            async with world.completion(max_tokens=30, stream=True) as response:
                lines = [await response.content.readline() for _ in range(6)]
                assert lines == [b": serving\n", b"\n"] * 3
                for rank in world.ranks.values():
                    rank.pace.set()
                assert "".join([t async for t in texts(response)]) == expected_text("Hi", 30)


class TestDeathOfARank:
    @story
    async def test_its_request_goes_on_elsewhere_without_gap_or_repeat(self, tmp_path):
        async with a_world(tmp_path) as world:
            await world.form()
            async with world.completion(max_tokens=200, stream=True) as response:
                stream, seen = texts(response), ""
                while len(seen) < 20:
                    seen += await anext(stream)
                victim = next(r for r in world.ranks.values() if r.requests)
                survivor = next(r for r in world.ranks.values() if r is not victim)
                await victim.close()
                async for text in stream:
                    seen += text
            assert seen == expected_text("Hi", 200)
            (moved,) = survivor.given
            assert 20 <= len(moved.produced) < 200
            assert bytes(moved.produced).decode() == seen[: len(moved.produced)]
            assert world.supervisor.service.status()["requests"]["requeued"] == 1

    @story
    async def test_it_returns_as_a_new_incarnation(self, tmp_path):
        async with a_world(tmp_path) as world:
            await world.form()
            await world.ranks[1].close()
            await world.until(lambda: world.supervisor.service.status()["epoch"] == 2)
            world.start_rank(1)
            await world.until(world.is_whole)
            status = world.supervisor.service.status()
            assert (status["epoch"], status["ranks"][1]["incarnation"]) == (3, 2)
            kinds = [event["kind"] for event in status["events"]]
            story = ["dead", "prepare", "commit", "incarnation", "offered", "prepare", "commit"]
            # Beside it: what each change cost, and the end of the process, which may be before or
            # after its death is settled, but is before its return.
            assert [kind for kind in kinds if kind in story][-7:] == story
            death = kinds.index("dead")
            assert "ended" in kinds[death - 1 : kinds.index("incarnation", death)]

    @story
    async def test_a_rank_that_reads_nothing_blocks_no_other(self, tmp_path):
        async with a_world(tmp_path, ranks=3) as world:
            await world.form()
            world.ranks[2].reads = False
            channels = world.supervisor.channels
            before = channels.of(2)
            await world.ranks[2].break_channel()
            await world.until(lambda: channels.of(2) is not before and channels.settled([2]))
            others = [asyncio.create_task(world.complete(seed=n, max_tokens=30)) for n in range(12)]
            await world.until(lambda: sum(t.done() for t in others) >= 8)
            deaf = len(world.supervisor.requests.of_rank(2))
            assert deaf == 12 - sum(t.done() for t in others)
            await world.ranks[2].close()  # and what it was given is done by others in the end
            answers = await asyncio.gather(*others)
            assert answers == [(200, expected_text("Hi", 30, seed=n)) for n in range(12)]


class TestDrain:
    @story
    async def test_its_requests_go_on_elsewhere_and_it_comes_back(self, tmp_path):
        async with a_world(tmp_path) as world:
            await world.form()
            async with world.completion(max_tokens=200, stream=True) as response:
                stream, seen = texts(response), ""
                while len(seen) < 20:
                    seen += await anext(stream)
                leaving = next(r for r in world.ranks.values() if r.requests)
                stays = next(r for r in world.ranks.values() if r is not leaving)
                request = ScaleRequest(action="scale_down", ranks=(leaving.rank,))
                assert world.supervisor.service.apply(request)["draining"] == [leaving.rank]
                async for text in stream:
                    seen += text
            assert seen == expected_text("Hi", 200)
            assert len(stays.given[0].produced) >= 20 and not leaving.requests
            await world.until(lambda: leaving.state.mode is Mode.STANDBY)
            status = world.supervisor.service.status()
            assert status["background"]["drained"] == [leaving.rank]
            assert status["ranks"][leaving.rank]["drained"]
            with pytest.raises(InvalidMove, match="is out already"):
                world.supervisor.service.apply(request)
            world.supervisor.service.apply(ScaleRequest(action="scale_up", count=1))
            await world.until(world.is_whole)
            assert leaving.incarnation == 1

    @story
    async def test_a_new_supervisor_knows_who_is_out_and_takes_no_request_back(self, tmp_path):
        async with a_world(tmp_path) as world:
            await world.form()
            request = asyncio.create_task(world.complete(max_tokens=40, key="one"))
            await world.until(lambda: any(r.requests for r in world.ranks.values()))
            leaving = next(r for r in world.ranks.values() if r.requests)
            stays = next(r for r in world.ranks.values() if r is not leaving)
            world.supervisor.service.apply(ScaleRequest(action="scale_down", ranks=(leaving.rank,)))
            await world.until(lambda: world.supervisor.state.view.in_epoch == (stays.rank,))
            await world.stop_supervisor()
            await asyncio.gather(request, return_exceptions=True)
            world.supervisor = None
            supervisor = await world.start_supervisor()
            assert supervisor.state.out == {leaving.rank}
            answer = await world.complete(max_tokens=40, key="one")
            assert answer == (200, expected_text("Hi", 40))
            await world.until(lambda: supervisor.service.status()["ranks"][leaving.rank]["drained"])
            supervisor.service.apply(ScaleRequest(action="scale_up", ranks=(leaving.rank,)))
            await world.until(world.is_whole)


class TestABrokenChannel:
    @story
    async def test_tokens_that_were_lost_with_it_are_told_again(self, tmp_path):
        async with a_world(tmp_path) as world:
            await world.form()
            async with world.completion(max_tokens=300, stream=True) as response:
                stream, seen = texts(response), await anext(texts(response))
                for _ in range(3):
                    holder = next(r for r in world.ranks.values() if r.requests)
                    known = len(seen)
                    await holder.break_channel()
                    while len(seen) < known + 40:
                        seen += await anext(stream)
                async for text in stream:
                    seen += text
            assert seen == expected_text("Hi", 300)
            assert world.supervisor.service.status()["requests"]["requeued"] == 0

    @story
    async def test_tokens_before_the_rank_said_what_it_has_are_not_held_against_it(self, tmp_path):
        """A rank in mid-step sends Produced on a new channel before its Held, maybe with a gap."""
        async with a_world(tmp_path) as world:
            await world.form()
            rank = world.ranks[0]
            rank.pace.clear()
            world.ranks[1].pace.clear()
            answer = asyncio.create_task(world.complete(max_tokens=5))
            await world.until(lambda: rank.given)
            request, _ = rank.requests[rank.given[0].id]
            async with connection_to(tmp_path, TOKEN) as socket:
                hello = hello_of(0, rank.body.pid, "tiny", rank.incarnation)
                gap = Progress(id=request.id, start=3, tokens=(97,))
                await socket.send_bytes(encode(hello))
                await socket.send_bytes(encode(messages.Produced(progress=(gap,))))
                await socket.send_bytes(encode(messages.Held(progress=())))
                again = await receive(socket)
                assert again == messages.Generate(request=request)
            rank.pace.set()
            assert await answer == (200, expected_text("Hi", 5))


class TestRestart:
    @story
    async def test_a_new_supervisor_goes_on_with_the_same_requests(self, tmp_path):
        async with a_world(tmp_path) as world:
            await world.form()
            before = world.supervisor.state
            body = {"key": "mine", "max_tokens": 400, "stream": True}
            async with world.completion(**body) as response:
                await anext(texts(response))
                for rank in world.ranks.values():
                    rank.pace.clear()
                await world.stop_supervisor()
            done = await world.start_supervisor()
            after = done.state
            assert (after.view, after.placement) == (before.view, before.placement)
            assert [r.incarnation for r in after.records] == [1, 1]
            await world.until(world.is_whole)
            for rank in world.ranks.values():
                rank.pace.set()
            async with world.completion(**body) as response:
                assert "".join([t async for t in texts(response)]) == expected_text("Hi", 400)
            assert sum(len(r.given) for r in world.ranks.values()) == 1, "it was begun twice"

    @story
    async def test_every_request_stays_on_the_rank_that_has_it(self, tmp_path):
        async with a_world(tmp_path, ranks=3) as world:
            await world.form()
            for rank in world.ranks.values():
                rank.pace.clear()
            ask = lambda n: world.complete(key=f"key{n}", seed=n, max_tokens=5)
            asking = [asyncio.create_task(ask(n)) for n in range(9)]
            held = lambda: [sorted(rank.requests) for rank in world.ranks.values()]
            await world.until(lambda: [len(ids) for ids in held()] == [3, 3, 3])
            before = held()
            await world.stop_supervisor()
            await asyncio.gather(*asking, return_exceptions=True)
            await world.start_supervisor()
            await world.until(world.is_whole)
            await world.until(lambda: world.supervisor.requests.running == 9)
            assert held() == before
            assert [len(rank.given) for rank in world.ranks.values()] == [3, 3, 3]
            for rank in world.ranks.values():
                rank.pace.set()
            answers = await asyncio.gather(*map(ask, range(9)))
            assert answers == [(200, expected_text("Hi", 5, seed=n)) for n in range(9)]

    @story
    async def test_a_rank_that_died_meanwhile_is_found_dead(self, tmp_path):
        async with a_world(tmp_path) as world:
            await world.form()
            await world.stop_supervisor()
            await world.ranks[0].close()
            await world.start_supervisor()
            await world.until(lambda: world.supervisor.service.status()["epoch"] == 2)
            ranks = world.supervisor.service.status()["ranks"]
            assert [r["state"] for r in ranks] == [
                "absent",
                "active",
            ]
            assert await world.complete(max_tokens=4) == (200, expected_text("Hi", 4))

    @story
    async def test_a_whole_cluster_that_ended_comes_back_on_its_run_directory(self, tmp_path):
        async with a_world(tmp_path) as world:
            await world.form()
            assert (await world.complete(key="k", max_tokens=6))[0] == 200
            await world.stop_supervisor()
            for rank in list(world.ranks.values()):
                await rank.close()
            await world.start_supervisor()
            for rank in range(2):
                world.start_rank(rank)
            await world.until(world.is_whole)
            assert [r["incarnation"] for r in world.supervisor.service.status()["ranks"]] == [2, 2]
            assert await world.complete(key="k", max_tokens=6) == (200, expected_text("Hi", 6))
            assert not any(rank.given for rank in world.ranks.values()), "a finished one ran again"

    @story
    async def test_compaction_changes_nothing_that_a_restart_sees(self, tmp_path):
        async with a_world(tmp_path) as world:
            await world.form()
            await world.complete(key="done", max_tokens=3)
            for rank in world.ranks.values():
                rank.pace.clear()
            waiting = asyncio.create_task(world.complete(key="open", max_tokens=3))
            await world.until(lambda: world.supervisor.requests.running == 1)
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
            supervisor = world.supervisor
            supervisor.compact()
            await world.stop_supervisor()
            after = Supervisor(world.config, tmp_path, TOKEN)
            assert (after.state.view, after.state.placement) == (
                supervisor.state.view,
                supervisor.state.placement,
            )
            assert after.state.epoch_tried == supervisor.state.epoch_tried
            strip = lambda table: {
                i: (e.request, e.key, e.body, e.finish, e.produced if e.finish else [])
                for i, e in table.entries.items()
            }
            assert strip(after.requests) == strip(supervisor.requests)
            assert all("time" in event for event in after.service.status()["events"])

    @story
    async def test_it_takes_its_old_ports_if_they_are_free_and_others_if_not(self, tmp_path):
        async with a_world(tmp_path) as world:
            await world.start_supervisor()
            first = world.url
            await world.stop_supervisor()
            await world.start_supervisor()
            assert world.url == first
            await world.stop_supervisor()
            port = int(first.rpartition(":")[2])
            taker = await asyncio.start_server(lambda r, w: w.close(), "127.0.0.1", port)
            async with taker:
                await world.start_supervisor()
                assert world.url != first


class TestProcesses:
    @story
    async def test_a_second_process_of_a_living_rank_waits(self, tmp_path):
        async with a_world(tmp_path) as world:
            await world.form()
            async with connection_to(tmp_path, TOKEN) as socket:
                await socket.send_bytes(encode(hello_of(0, os.getpid(), "tiny")))
                answer = await receive(socket)
            assert isinstance(answer, Refused) and "which lives" in answer.reason

    @story
    async def test_a_process_that_lost_its_welcome_is_welcomed_again(self, tmp_path):
        async with a_world(tmp_path) as world:
            await world.start_supervisor()
            hello = encode(hello_of(0, os.getpid(), "tiny"))
            for _ in range(2):
                async with connection_to(tmp_path, TOKEN) as socket:
                    await socket.send_bytes(hello)
                    assert await receive(socket) == Welcome(incarnation=1)
            assert world.supervisor.state.records[0].incarnation == 1

    @story
    async def test_a_pid_that_is_another_process_now_is_not_taken_for_the_rank(self, tmp_path):
        """A rank may die, and its pid be used again, before its Hello is read."""
        async with a_world(tmp_path, fenced_grace_ms=0) as world:
            await world.start_supervisor()
            world.start_rank(0)
            gone = world.start_rank(1, ticks=1)  # its body started at another time
            await world.until(lambda: world.supervisor.state.records[1].ended)
            assert world.supervisor.service.status()["ranks"][1]["pid"] is None
            assert gone.body.poll() is None, "an innocent process was killed"

    @story
    async def test_tokens_that_cannot_be_are_refused(self, tmp_path):
        async with a_world(tmp_path) as world:
            await world.form()
            rank = world.ranks[0]
            for changes in ({"tokens": (256,)}, {"tokens": (), "finish": "done"}):
                progress = Progress(**{"id": "x", "start": 0, **changes})
                before = rank.connections
                await rank.say(messages.Produced(progress=(progress,)))
                await world.until(lambda before=before: rank.connections > before)
            assert (await world.complete(max_tokens=3))[0] == 200

    @story
    async def test_an_old_incarnation_is_fenced_and_takes_nothing_from_the_new_one(self, tmp_path):
        async with a_world(tmp_path) as world:
            await world.form()
            await world.ranks[0].close()
            await world.until(lambda: world.supervisor.service.status()["epoch"] == 2)
            fresh = world.start_rank(0)
            await world.until(world.is_whole)
            async with connection_to(tmp_path, TOKEN) as socket:
                await socket.send_bytes(encode(hello_of(0, fresh.body.pid, "tiny", incarnation=1)))
                assert isinstance(await receive(socket), Fenced)
                answers = [world.complete(seed=n, max_tokens=3) for n in range(4)]
                assert {status for status, _ in await asyncio.gather(*answers)} == {200}
            assert fresh.given

    @story
    async def test_a_fenced_process_that_calls_again_gets_no_request(self, tmp_path):
        async with a_world(tmp_path, ranks=1, fenced_grace_ms=60_000) as world:
            await world.form()
            rank = world.ranks[0]
            rank.pace.clear()
            answer = asyncio.create_task(world.complete(max_tokens=3))
            await world.until(lambda: rank.given)
            held = rank._held()
            for task in rank._tasks:  # it is silent, and does not end
                task.cancel()
            await world.until(lambda: world.supervisor.state.blocked)
            async with connection_to(tmp_path, TOKEN) as socket:
                hello = hello_of(0, rank.body.pid, "tiny", rank.incarnation)
                await socket.send_bytes(encode(hello))
                await socket.send_bytes(encode(messages.Held(progress=held)))
                await socket.send_bytes(
                    encode(messages.Telemetry(compilations=0, steps=1, discarded=0, moved={}))
                )
                await asyncio.sleep(0.1)
            assert world.supervisor.requests.waiting == 1
            await rank.close()
            world.start_rank(0)
            assert await answer == (200, expected_text("Hi", 3))


class TestReports:
    @story
    async def test_status_health_and_metrics_agree(self, tmp_path):
        async with a_world(tmp_path) as world:
            await world.form()
            await world.complete(max_tokens=5)
            telemetry = messages.Telemetry(compilations=2, steps=9, discarded=1, moved={"peer": 3})
            await world.ranks[1].say(telemetry)
            await world.until(lambda: 1 in world.supervisor.telemetry)
            async with aiohttp.ClientSession() as session:
                async with session.get(world.url + "/v1/fault_tolerance/status") as response:
                    status = await response.json()
                async with session.get(world.url + "/metrics") as response:
                    lines = (await response.text()).splitlines()
                async with session.get(world.url + "/health") as response:
                    health = await response.json()
            assert status["requests"]["finished"] == 1 and status["requests"]["tokens"] == 5
            assert status["ranks"][1]["compilations_after_start"] == 2
            assert status["ranks"][1]["experts_moved"] == {"peer": 3}
            assert health == {
                "status": "serving",
                "epoch": 1,
                "active_ranks": [0, 1],
                "reason": "",
                "problems": [],
            }
            assert {"eep_active_ranks 2.0", "eep_tokens_total 5.0", "eep_epoch 1.0"} <= set(lines)
            assert any(line.startswith('eep_events_total{kind="commit"} 1') for line in lines)

    @story
    async def test_what_happened_is_in_the_journal(self, tmp_path):
        async with a_world(tmp_path) as world:
            await world.form()
            await world.complete(max_tokens=3)
        kinds = [record["kind"] for record in replay(tmp_path / JOURNAL)]
        for kind in ("process", "offered", "prepare", "commit", "accepted", "finished"):
            assert kind in kinds
        assert kinds.index("prepare") < kinds.index("commit") < kinds.index("accepted")


@story
async def test_a_supervisor_that_sees_no_processes_any_more_ends_aloud(tmp_path, monkeypatch):
    """Its launcher starts another one; left alone it would serve on and miss deaths."""

    def broken(pid: int) -> bool:
        raise RuntimeError("cannot look at processes")

    async with a_world(tmp_path) as world:
        await world.form()
        monkeypatch.setattr(local, "is_ending", broken)
        with pytest.raises(RuntimeError, match="cannot look"):
            await world._running
        monkeypatch.undo()
        world._stop = None
        await world.start_supervisor()
        await world.until(world.is_whole)


def test_the_supervisor_never_loads_jax():
    code = (
        "import sys, eep_jax; assert 'eep_jax.runtime' not in sys.modules;"
        "import launch.supervise, eep_jax.runtime.supervisor.supervisor;"
        "heavy = {m.partition('.')[0] for m in sys.modules} & {'jax', 'jaxlib', 'flax', 'orbax'};"
        "sys.exit(f'loaded {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60, text=True)
    assert done.returncode == 0, done.stderr
