"""Real ranks, under load: redundancy comes back by itself; ranks are taken out and taken back."""

import time

import aiohttp
import pytest

from configs import tiny_cpu
from tests.support.processes import RANKS, ClusterUnderTest, events_after, is_out
from tests.support.small_checkpoint import save_small

pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(400)]


LAYERS, MATRICES, WIDTH, HIDDEN = tiny_cpu.get_config().model.expert_shape
EXPERT_BYTES = LAYERS * MATRICES * WIDTH * HIDDEN * 4  # in a bank of float32
BYTES_PER_S = 2 * EXPERT_BYTES


@pytest.fixture(scope="module")
def roomy(tmp_path_factory):
    """Four free slots on each rank; nobody brings a dead rank back."""
    settings = ("cluster.slots_per_rank=12", f"cluster.background_bytes_per_s={BYTES_PER_S}")
    run_dir = tmp_path_factory.mktemp("roomy")
    with ClusterUnderTest(run_dir, *settings, respawn_delay_ms=-1) as cluster:
        yield cluster


def apply(cluster, **body) -> tuple[int, dict]:
    async def post():
        url = cluster.cluster.url + "/v1/fault_tolerance/apply"
        async with aiohttp.ClientSession() as session, session.post(url, json=body) as answer:
            return answer.status, await answer.json()

    return cluster.run(post())


def numbers(cluster, name: str) -> dict[int, int]:
    time.sleep(0.7)  # until every rank has sent its numbers once more
    return {r["rank"]: r[name] for r in cluster.status()["ranks"]}


def test_a_rank_is_drained_and_comes_back_without_a_lost_step(roomy):
    started, discarded = time.time(), numbers(roomy, "steps_discarded")
    before = roomy.status()
    with roomy.load():
        code, answer = apply(roomy, action="scale_down", ranks=[3])
        assert code == 200 and answer["draining"] + answer["drained"] == [3], answer
        status = roomy.wait(lambda s: s["background"]["drained"] == [3], "the end of the drain")
        roomy.wait(is_out(3), "service without rank 3")
        assert status["ranks"][3]["drained"]
        standing_by = roomy.wait(lambda s: s["ranks"][3]["mode"] == "standby", "it to stand by")
        assert standing_by["experts"]["missing"] == []
        assert apply(roomy, action="scale_down", ranks=[3])[0] == 409
        roomy.wait(
            lambda s: s["experts"]["replicas_min"] == 2 and s["background"]["fetching"] == 0,
            "every expert to have two replicas on three ranks",
        )
        code, answer = apply(roomy, action="scale_up", ranks=[3])
        assert code == 200 and answer["drained"] in ([], [3]), answer
        roomy.wait_whole()
    after = roomy.status()
    assert after["ranks"][3]["pid"] == before["ranks"][3]["pid"]
    changes = [e["change"] for e in events_after(after, started, "commit")]
    assert {"drain", "admission"} <= set(changes) <= {"drain", "admission", "background"}
    assert numbers(roomy, "steps_discarded") == discarded
    for rank in range(RANKS):
        assert "do not hold" not in roomy.cluster.log_path(f"rank{rank}").read_text()
    roomy.assert_nothing_compiled()


def test_measured_load_is_spread_while_ranks_serve(tmp_path):
    """The router likes the experts of rank 0 alone; each has one replica, and slots are free."""
    liked = (0, 4, 8, 12)
    with ClusterUnderTest(
        tmp_path / "run",
        "cluster.redundancy=1",
        arguments=(save_small(tmp_path / "checkpoint", liked),),
    ) as cluster:
        first = events_after(cluster.status(), 0, "commit")[0]  # load is measured from then on
        assert first["change"] == "formation" and set(first["slots"][0]) == {*liked, -1}
        with cluster.load():
            status = cluster.wait(spread, "a change that spreads load")
            discarded = numbers(cluster, "steps_discarded")
        experts = status["experts"]
        busiest = sum(experts["load"][expert] for expert in liked) * RANKS
        assert experts["imbalance"] < 0.8 * busiest, "as it would be where it all began"
        moves = [move for commit in spread(status) for move in commit["moves"]]
        assert moves[0]["expert"] in liked and all("peer" in move["sources"] for move in moves)
        assert all(move["rank"] != 0 for move in moves), moves
        assert len(moves) <= 2 * len(liked), moves
        assert discarded == dict.fromkeys(range(RANKS), 0), "all ranks stopped at the same round"
        cluster.assert_nothing_compiled()


def spread(status: dict) -> list[dict]:
    commits = events_after(status, 0, "commit")
    return [commit for commit in commits if commit["reason"] == "load is spread"]


def test_what_cannot_be_drained_is_refused_with_its_numbers(roomy):
    code, answer = apply(roomy, action="scale_down", ranks=[0, 1, 2])
    assert code == 409 and "16 slots are needed and ranks [3] have 12" in answer["error"]["message"]
    code, answer = apply(roomy, action="scale_down", ranks=[7])
    assert code == 409 and "0..3" in answer["error"]["message"]
    assert apply(roomy, action="scale_up", ranks=[1])[0] == 409
    assert apply(roomy, action="melt", ranks=[1])[0] == 400


def assert_no_faster_than_allowed(commits) -> None:
    """After the repair, each rank brought its experts no faster than `background_bytes_per_s`."""
    (repaired,) = [commit for commit in commits if commit["change"] == "repair"]
    for rank in range(RANKS):
        brought = [c["time"] for c in commits for m in c["moves"] if m["rank"] == rank]
        seconds = max(brought, default=repaired["time"]) - repaired["time"]
        assert seconds >= (len(brought) - 1) * EXPERT_BYTES / BYTES_PER_S, commits


def test_redundancy_is_restored_while_the_survivors_serve(roomy):
    started = time.time()
    with roomy.load():
        roomy.signal(2)
        roomy.wait(is_out(2), "the eviction of rank 2")
        status = roomy.wait(
            lambda s: s["experts"]["replicas_min"] == 2 and s["state"] == "serving",
            "every expert to have two replicas again",
        )
        discarded = numbers(roomy, "steps_discarded")
        assert status["ranks"][2]["state"] == "absent"
    commits = events_after(status, started, "commit")
    background = [commit for commit in commits if commit["change"] == "background"]
    moved = [move for commit in background for move in commit["moves"]]
    assert 1 <= len(moved) <= 8, background  # rank 2 held eight; of some there were three replicas
    for commit in background:
        per_rank = [move["rank"] for move in commit["moves"]]
        assert max(per_rank.count(rank) for rank in range(RANKS)) <= 2
    assert_no_faster_than_allowed(commits)
    assert all(discarded[rank] <= 2 for rank in (0, 1, 3)), discarded
    roomy.cluster.start_rank(2)
    roomy.wait_whole()
    roomy.assert_nothing_compiled()
