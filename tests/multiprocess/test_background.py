"""Real ranks, under load: redundancy comes back by itself; ranks are taken out and taken back."""

import time

import aiohttp
import pytest

from tests.support.processes import RANKS, ClusterUnderTest, events_after, is_out

pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def roomy(tmp_path_factory):
    """Four free slots on each rank; nobody brings a dead rank back."""
    run_dir = tmp_path_factory.mktemp("roomy")
    with ClusterUnderTest(run_dir, "cluster.slots_per_rank=12", respawn_delay_ms=-1) as cluster:
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


def test_what_cannot_be_drained_is_refused_with_its_numbers(roomy):
    code, answer = apply(roomy, action="scale_down", ranks=[0, 1, 2])
    assert code == 409 and "16 slots are needed and ranks [3] have 12" in answer["error"]["message"]
    code, answer = apply(roomy, action="scale_down", ranks=[7])
    assert code == 409 and "0..3" in answer["error"]["message"]
    assert apply(roomy, action="scale_up", ranks=[1])[0] == 409
    assert apply(roomy, action="melt", ranks=[1])[0] == 400


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
    assert all(discarded[rank] <= 2 for rank in (0, 1, 3)), discarded
    roomy.cluster.start_rank(2)
    roomy.wait_whole()
    roomy.assert_nothing_compiled()
