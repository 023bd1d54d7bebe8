"""The supervisor dies: ranks go on, the next one takes over, and still handles failures."""

import asyncio
import time

import aiohttp
import pytest

from launch.cluster import SUPERVISOR
from tests.support.processes import CONCURRENCY, is_out, jobs

pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(400)]


async def insist(cluster, number: int, body: dict) -> dict:
    """Asks with one key until there is an answer, as a client does whose connection broke."""
    ends_s = time.monotonic() + 120
    while time.monotonic() < ends_s:
        try:
            status, answer = await cluster.post(
                body, key=f"{time.monotonic_ns() // 10**12}-{number}"
            )
            if status == 200:
                return answer
            assert status in (429, 503), answer
        except (aiohttp.ClientError, OSError, ValueError):
            pass
        await asyncio.sleep(0.1)
    raise TimeoutError(f"no answer to request {number}")


def test_a_killed_supervisor_loses_no_request_and_still_handles_a_failure(cluster):
    bodies = jobs()
    old = cluster.cluster.children[SUPERVISOR].process.pid

    async def all_answers():
        return await asyncio.gather(*(insist(cluster, n, body) for n, body in enumerate(bodies)))

    answers = asyncio.run_coroutine_threadsafe(all_answers(), cluster._loop)
    cluster.wait(lambda s: s["requests"]["running"] >= CONCURRENCY - 2, "load on the cluster")
    survivors = lambda s: [r["steps"] for r in s["ranks"] if r["rank"] != 1]
    before = survivors(cluster.status())
    cluster.cluster.kill(SUPERVISOR)
    status = cluster.wait(lambda s: s["state"] == "serving", "the next supervisor")
    assert cluster.cluster.children[SUPERVISOR].process.pid != old
    assert [e["kind"] for e in status["events"]].count("restarted") >= 1
    cluster.signal(1)
    cluster.wait(is_out(1), "an eviction by the next supervisor")
    texts = [answer["choices"][0]["text"] for answer in answers.result(180)]
    assert texts == [result.text for result in cluster.truth]
    after = cluster.wait_whole()
    went_on = zip(before, survivors(after), strict=True)
    assert all(now > then for then, now in went_on), "no process but the killed one began anew"


def test_a_rank_that_dies_while_no_supervisor_runs_is_found_dead(cluster):
    with_load = asyncio.run_coroutine_threadsafe(
        asyncio.wait_for(_answers(cluster), 150), cluster._loop
    )
    cluster.wait(lambda s: s["requests"]["running"] >= 4, "load on the cluster")
    cluster.cluster.kill(SUPERVISOR)
    cluster.signal(3)
    cluster.wait(is_out(3), "the eviction of the rank that died unseen")
    assert with_load.result(180) == [result.text for result in cluster.truth]


async def _answers(cluster) -> list[str]:
    found = await asyncio.gather(*(insist(cluster, 100 + n, b) for n, b in enumerate(jobs())))
    return [answer["choices"][0]["text"] for answer in found]
