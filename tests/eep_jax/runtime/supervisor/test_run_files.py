"""A supervisor opens only what it may and can continue, and ends ranks only when told to."""

import asyncio
import dataclasses
import os

import pytest

from eep_jax.coordination.protocol import Fenced
from eep_jax.errors import RunDirError
from eep_jax.runtime.control import run_owner
from eep_jax.runtime.control.endpoint import JOURNAL
from eep_jax.runtime.control.messages import Shutdown
from eep_jax.runtime.control.run_owner import RunTaken
from eep_jax.runtime.history.journal import Journal, replay
from eep_jax.runtime.supervisor.run_files import open_run
from tests.support.control_world import a_config, a_world, expected_text, story
from tests.support.disks import room_for


def told_to_end(world) -> bool:
    return any(isinstance(m, Shutdown) for rank in world.ranks.values() for m in rank.heard)


@pytest.mark.parametrize(
    "changes, differs",
    [
        ({"ranks": 8}, "cluster.ranks was 8, is 2"),
        ({"slots_per_rank": 6}, "cluster.slots_per_rank was 6, is 4"),
    ],
)
def test_another_configuration_is_refused_naming_what_differs(tmp_path, changes, differs):
    open_run(tmp_path, a_config(**changes)).close()
    before = (tmp_path / JOURNAL).read_bytes()
    with pytest.raises(RunDirError, match=f"another configuration: {differs}. Start it with that"):
        open_run(tmp_path, a_config())
    assert (tmp_path / JOURNAL).read_bytes() == before
    open_run(tmp_path, a_config(**changes)).close()


def test_another_model_is_refused_and_other_limits_are_not(tmp_path):
    config = a_config()
    open_run(tmp_path, config).close()
    model = dataclasses.replace(config.model, hidden=16)
    with pytest.raises(RunDirError, match=r"model\.hidden was 8, is 16"):
        open_run(tmp_path, dataclasses.replace(config, model=model))
    open_run(tmp_path, a_config(lease_ms=9_000, serve={"queue_max": 3})).close()


@pytest.mark.parametrize(
    "kind, facts",
    [
        ("dead", {"rank": 2, "incarnation": 1}),
        ("incarnation", {"rank": -1, "incarnation": 1}),
        ("process", {"rank": 0, "incarnation": 1}),
        ("commit", {"epoch": 1, "members": {"0": 1}, "incarnations": [1, 0], "slots": [[0]]}),
        (
            "commit",
            {"epoch": 1, "members": {"5": 1}, "incarnations": [1, 0], "slots": [[0] * 4] * 2},
        ),
        ("accepted", {"request": {"id": "a"}}),
        ("accepted", {"request": None}),
        ("tried", {}),
        ("of tomorrow", {}),
    ],
)
def test_a_record_of_another_shape_is_one_error_and_is_kept(tmp_path, kind, facts):
    files = open_run(tmp_path, a_config())
    files.journal.append(kind, facts)
    files.close()
    before = (tmp_path / JOURNAL).read_bytes()
    with pytest.raises(RunDirError, match=r"record 1 of the journal, .*; or move the journal away"):
        open_run(tmp_path, a_config())
    assert (tmp_path / JOURNAL).read_bytes() == before
    assert list(tmp_path.glob("*.owner.*")) == []


@story
async def test_a_supervisor_that_was_replaced_steps_down_and_leaves_the_ranks(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(run_owner, "BEAT_MS", 0)
    async with a_world(tmp_path) as world:
        await world.form()
        (path,) = tmp_path.glob("supervisor.owner.*")
        path.rename(path.with_suffix(".2"))  # of a later term, and not this one's
        with pytest.raises(RunTaken, match="leaves the ranks to it"):
            await world._running
        world._stop = None
        assert not told_to_end(world)
        path.with_suffix(".2").unlink()
        await world.start_supervisor()
        await world.until(world.is_whole)
        assert [rank.incarnation for rank in world.ranks.values()] == [1, 1]


@story
async def test_any_end_but_a_wish_to_stop_leaves_the_ranks(tmp_path, monkeypatch):
    async with a_world(tmp_path) as world:
        await world.form()
        monkeypatch.setattr(world.supervisor.event_log, "note_costs", lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            await world._running
        world._stop = None
        assert not told_to_end(world)
        await world.start_supervisor()
        await world.until(world.is_whole)
        await world.stop_supervisor()
        await world.until(lambda: told_to_end(world))


@story
async def test_what_was_taken_on_without_a_disk_is_written_once_there_is_room(tmp_path):
    async with a_world(tmp_path) as world:
        await world.form()
        with room_for(0):
            answer = await world.complete(key="unwritten", max_tokens=3)
            assert answer == (200, expected_text("Hi", 3))
            healthy, facts = world.supervisor.service.health()
            assert healthy and "the journal is off" in facts["problems"][-1]
            await asyncio.sleep(0.1)
            assert "accepted" not in [r["kind"] for r in replay(tmp_path / JOURNAL)]
        await world.until(lambda: not world.supervisor.service.health()[1]["problems"])
        assert [r["kind"] for r in replay(tmp_path / JOURNAL)].count("finished") == 1
        await world.stop_supervisor()
        await world.start_supervisor()
        await world.until(world.is_whole)
        given = sum(len(rank.given) for rank in world.ranks.values())
        assert await world.complete(key="unwritten", max_tokens=3) == answer
        assert sum(len(rank.given) for rank in world.ranks.values()) == given


@story
async def test_without_texts_the_journal_holds_ids_alone(tmp_path):
    async with a_world(tmp_path) as world:
        await world.form()
        assert (await world.complete(key="private", prompt="Hidden", max_tokens=3))[0] == 200
        assert b"private" in (tmp_path / JOURNAL).read_bytes()
        await world.stop_supervisor()
        serve = dataclasses.replace(world.config.serve, journal_texts=False)
        world.config = dataclasses.replace(world.config, serve=serve)
        supervisor = await world.start_supervisor()
        assert b"private" not in (tmp_path / JOURNAL).read_bytes(), "what was there is forgotten"
        await world.until(world.is_whole)
        for _ in range(2):
            assert await world.complete(key="secret", max_tokens=3) == (200, expected_text("Hi", 3))
        assert b"secret" not in (tmp_path / JOURNAL).read_bytes()
        written = [r for r in replay(tmp_path / JOURNAL) if r["kind"] in ("accepted", "finished")]
        assert [r.keys() for r in written] == [
            {"id", "created", "time", "kind"},
            {"id", "finish", "time", "kind"},
        ]
        before = supervisor.state
        await world.stop_supervisor()
        after = await world.start_supervisor()
        assert after.state.view == before.view and not after.requests.entries
        await world.until(world.is_whole)
        assert await world.complete(key="secret", max_tokens=3) == (200, expected_text("Hi", 3))


@story
async def test_ranks_that_the_journal_does_not_know_are_told_why_and_followed_by_new_ones(tmp_path):
    """An old copy of the journal was put back: rank 1 has died and come back since."""
    async with a_world(tmp_path) as world:
        await world.form()
        old = (tmp_path / JOURNAL).read_bytes()
        await world.ranks[1].close()
        await world.until(lambda: world.supervisor.state.view.in_epoch == (0,))
        late = world.start_rank(1)
        await world.until(world.is_whole)
        await world.stop_supervisor()
        (tmp_path / JOURNAL).write_bytes(old)
        supervisor = await world.start_supervisor()
        told = lambda: [m.reason for m in late.heard if isinstance(m, Fenced)]
        await world.until(told)
        expected = (
            "the journal is older than rank 1: it knows incarnation 1, this process is 2; it has "
            "to end, and a new process takes its place"
        )
        assert told()[0] == expected
        problems = lambda: supervisor.service.health()[1]["problems"]
        await world.until(lambda: any(p.startswith(expected) for p in problems()))
        await late.close()  # as it has to
        await world.until(lambda: supervisor.state.view.in_epoch == (0,))
        assert await world.complete(max_tokens=3) == (200, expected_text("Hi", 3))
        assert world.start_rank(1)
        await world.until(world.is_whole)
        assert [r.incarnation for r in world.ranks.values()] == [1, 3], "no number is issued twice"
        assert supervisor.service.health()[1]["problems"] == []


def test_a_journal_that_cannot_be_opened_gives_the_directory_back(tmp_path):
    Journal(tmp_path / JOURNAL).close()
    os.rename(tmp_path / JOURNAL, tmp_path / "kept")
    (tmp_path / JOURNAL).symlink_to(tmp_path / "kept")
    with pytest.raises(OSError):
        open_run(tmp_path, a_config())
    assert list(tmp_path.glob("*.owner.*")) == []
