"""Real clusters of real processes for tests, and the truth their completions are compared with."""

import asyncio
import contextlib
import signal
import threading
import time

import aiohttp

from launch.cluster import LocalCluster, is_whole, rank_name
from launch.demo import OPENINGS
from launch.load import Sample, run_load, run_once
from tests.support.kept_steps import shared_steps

MODEL = "tiny-moe-kjv"
RANKS = 4
CONCURRENCY = 10
WHOLE_S = 120.0  # a rank starts in seconds; a loaded machine may take long
EVENT_S = 60.0


def jobs(max_tokens: int = 64) -> list[dict]:
    """Greedy and seeded prompts, some longer than one prefill chunk."""
    common = {"model": MODEL, "max_tokens": max_tokens}
    greedy = [common | {"prompt": text, "temperature": 0} for text in OPENINGS]
    drawn = [
        common | {"prompt": text * 3, "temperature": 0.9, "top_p": 0.9, "seed": number}
        for number, text in enumerate(OPENINGS)
    ]
    return greedy + drawn


class ClusterUnderTest:
    """A LocalCluster whose watch runs in a thread of its own, driven by plain calls."""

    def __init__(
        self,
        run_dir,
        *overrides: str,
        arguments=(),
        ranks: int = RANKS,
        truth: bool = True,
        requests=None,
        respawn_delay_ms: int = 500,
        whole_s: float = WHOLE_S,
        joiner_nice: int = 0,
    ):
        """`requests` are what `load` sends, `jobs()` unless given.

        `truth`: whether completions are to be compared with those of an unharmed run. `whole_s` is
        how long all ranks may take to start. A rank comes back soonest with a `joiner_nice` of 0.
        """
        words = ["--config=tiny_cpu", "--port=0", *arguments]
        words += [f"--override={o}" for o in overrides]
        self.cluster = LocalCluster(words, ranks, str(run_dir), respawn_delay_ms, joiner_nice)
        self._steps = shared_steps(run_dir, ranks, words)
        self._wants_truth, self.requests = truth, requests or jobs()
        self._whole_s = whole_s
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def _start(self) -> None:
        self._steps.__enter__()
        self._thread.start()
        self.cluster.start()
        self._watch = asyncio.run_coroutine_threadsafe(self.cluster.watch(), self._loop)

    @contextlib.contextmanager
    def started(self):
        """Its processes run, whatever becomes of them; `with` itself waits until all serve."""
        self._start()
        try:
            yield self
        finally:
            self.__exit__()

    def __enter__(self) -> "ClusterUnderTest":
        self._start()
        try:
            self.wait_whole()
            self.truth = []
            if self._wants_truth:
                self.truth = self.run(run_once(self.cluster.url, self.requests, CONCURRENCY))
            assert [r.error for r in self.truth] == [None] * len(self.truth)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_) -> None:
        self._watch.cancel()
        self.cluster.stop()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)
        self._steps.__exit__(None, None, None)

    def run(self, coroutine, timeout_s: float = 180.0):
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(timeout_s)

    def wait(self, wanted, what: str, deadline_s: float = EVENT_S) -> dict:
        return self.run(self.cluster.wait_for(wanted, deadline_s, what, poll_ms=5), deadline_s + 30)

    def wait_whole(self) -> dict:
        return self.wait(is_whole, "a whole cluster", self._whole_s)

    def status(self) -> dict:
        return self.wait(lambda s: True, "a status")

    def signal(self, rank: int, number: int = signal.SIGKILL) -> None:
        self.cluster.kill(rank_name(rank), number)

    def pid(self, rank: int) -> int:
        return self.cluster.children[rank_name(rank)].process.pid

    @contextlib.contextmanager
    def load(self):
        """Keeps completions running while the body acts; then all must be as the truth says."""
        enough, results = asyncio.Event(), []

        async def generate() -> list[Sample]:
            return await run_load(self.cluster.url, self.requests, CONCURRENCY, enough)

        future = asyncio.run_coroutine_threadsafe(generate(), self._loop)
        try:
            self.wait(lambda s: s["requests"]["running"] >= CONCURRENCY - 2, "load on the cluster")
            yield results
        finally:
            self._loop.call_soon_threadsafe(enough.set)
            results += future.result(180)
        self.assert_identical(results)

    def assert_identical(self, results: list[Sample]) -> None:
        assert results
        for result in results:
            assert result.error is None, result.error
            assert result.text == self.truth[result.job].text
            assert result.finish_reason == self.truth[result.job].finish_reason

    def assert_nothing_compiled(self) -> None:
        time.sleep(0.7)  # until every rank has sent its numbers once more
        counts = {r["rank"]: r["compilations_after_start"] for r in self.status()["ranks"]}
        assert counts == dict.fromkeys(range(self.cluster.ranks), 0)

    async def post(self, body: dict, key: str | None = None, timeout_s: float = 60.0):
        """One completion that is not streamed: (status, JSON)."""
        headers = {"Idempotency-Key": key} if key else {}
        timeout = aiohttp.ClientTimeout(total=timeout_s)
        async with (
            aiohttp.ClientSession(timeout=timeout) as session,
            session.post(
                self.cluster.url + "/v1/completions", json=body, headers=headers
            ) as answer,
        ):
            return answer.status, await answer.json()


def is_out(rank: int, incarnation: int | None = None):
    """Whether a rank (or this incarnation of it) is no longer a member and the others serve."""

    def wanted(status: dict) -> bool:
        member = status["ranks"][rank]
        gone = member["state"] in ("absent", "joining") or (
            incarnation is not None and member["incarnation"] > incarnation
        )
        return gone and status["state"] == "serving"

    return wanted


def incarnation(status: dict, rank: int) -> int:
    return status["ranks"][rank]["incarnation"]


def events_after(status: dict, time_s: float, kind: str) -> list[dict]:
    return [e for e in status["events"] if e["kind"] == kind and e["time"] >= time_s]
