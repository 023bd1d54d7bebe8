"""Cluster of processes on this machine: starts, restarts and ends them."""

import asyncio
import contextlib
import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable

import aiohttp

from eep_jax.config import ClusterConfig
from eep_jax.errors import RunDirError
from eep_jax.runtime.control.admin_key import admin_headers
from eep_jax.runtime.control.endpoint import ENDPOINT
from eep_jax.runtime.control.last_words import find_last_words
from eep_jax.runtime.control.run_dir import make_private_file, make_run_dir, make_token
from eep_jax.runtime.control.run_owner import LAUNCHER, RunOwner, check_free, claim
from eep_jax.runtime.rank import priority
from eep_jax.runtime.rank.scratch_dir import open_scratch
from launch.program import EXIT_USAGE

SUPERVISOR = "supervisor"
WATCH_MS = 50
SPAWN_RETRY_S = 5.0
QUICK_DEATH_S = 10.0  # a process that ends sooner was never useful
DELAY_MAX_MS = 30_000
GIVE_UP_AFTER = 3  # quick deaths of one process before the cluster was ever healthy
LOG_TAIL_LINES = 15
LAST_WORDS_BYTES = 64 << 10  # of a log that are searched


class ClusterFailed(RuntimeError):
    """The cluster cannot start; the message holds the end of the failing process's log."""


@dataclasses.dataclass
class Child:
    """A process and its history."""

    name: str
    process: subprocess.Popen
    started_s: float
    quick_deaths: int = 0
    log_begin: int = 0  # offset in the log of its first line
    restart_at_s: float | None = None


class LocalCluster:
    """Supervisor and ranks as children of this process; all die with it."""

    def __init__(
        self,
        arguments: list[str],
        ranks: int,
        run_dir: str | None,
        respawn_delay_ms: int,
        joiner_nice: int = ClusterConfig.joiner_nice,
    ):
        """Creates the run directory and its token; `start` starts the processes.

        Args:
            arguments: Flags for every process.
            ranks: Number of ranks.
            run_dir: None: a temporary one, removed at the end unless the cluster failed.
            respawn_delay_ms: Before a dead rank is restarted; negative: only by `start_rank`.
            joiner_nice: See ClusterConfig.

        Raises:
            RunDirError: Other users can write to the directory, or it cannot be made.
            OSError: It cannot be written.
        """
        self._scratch = None if run_dir else open_scratch(tempfile.gettempdir(), "run")
        self.run_dir = make_run_dir(run_dir or self._scratch.path)
        make_run_dir(self.run_dir / "logs")
        make_token(self.run_dir)
        self._arguments, self.ranks, self._delay_ms = arguments, ranks, respawn_delay_ms
        self._joiner_nice = joiner_nice
        self._owner: RunOwner | None = None  # from `start` to `stop`
        self.children: dict[str, Child] = {}
        self.was_healthy = False
        self.failure: str | None = None
        self.exits: list[tuple[float, str, int]] = []  # monotonic seconds, name, exit status
        self.report: Callable[[str], None] = lambda text: None  # called when a process ends

    def start(self) -> None:
        """Starts all processes.

        Raises:
            RunDirError: Another launcher or supervisor uses the run directory.
            ClusterFailed: The directory cannot be written, or a process cannot be started.
        """
        try:
            self._owner = self._owner or claim(self.run_dir, LAUNCHER)
            check_free(self.run_dir)
        except OSError as error:
            raise ClusterFailed(f"{self.run_dir} cannot be used: {error.strerror}") from error
        self._spawn_all([SUPERVISOR, *map(rank_name, range(self.ranks))])

    def _spawn_all(self, names: Iterable[str]) -> None:
        for name in names:
            try:
                self._spawn(name)
            except OSError as error:
                raise ClusterFailed(f"{name} cannot be started: {error}") from error

    def start_rank(self, rank: int) -> None:
        """Starts a new process of a rank whose last process has ended."""
        self._spawn(rank_name(rank), nice=self._joiner_nice)

    def kill(self, name: str, number: int = signal.SIGKILL) -> float:
        """Sends a signal; returns the monotonic seconds at which it was sent."""
        now_s = time.monotonic()
        self.children[name].process.send_signal(number)
        return now_s

    async def watch(self) -> None:
        """Restarts dead processes until cancelled, or until `failure` holds why that is useless."""
        while self.failure is None:
            if not self._still_owns():
                return
            for child in list(self.children.values()):
                self._look_after(child)
            await asyncio.sleep(WATCH_MS / 1000)

    def _still_owns(self) -> bool:
        if self._owner is not None:
            try:
                self._owner.beat()
            except RunDirError as error:
                self.failure = str(error)
        return self.failure is None

    def _look_after(self, child: Child) -> None:
        now_s, status = time.monotonic(), child.process.poll()
        if status is None:
            return
        if child.restart_at_s is None:
            self.exits.append((now_s, child.name, status))
            quick = now_s - child.started_s < QUICK_DEATH_S or status == EXIT_USAGE
            child.quick_deaths = child.quick_deaths + 1 if quick else 0
            # An error of usage, however late, stays one: a restart cannot help.
            hopeless = status == EXIT_USAGE or child.quick_deaths >= GIVE_UP_AFTER
            if hopeless and not self.was_healthy:
                self.failure = (
                    f"{child.name} ended with status {status}:\n{self.log_tail(child.name)}"
                )
                return
            delay_ms = 200 if child.name == SUPERVISOR else self._delay_ms
            if delay_ms < 0:
                self._report_end(child, status, "")
                child.restart_at_s = float("inf")
                return
            delay_ms = min(delay_ms * 2 ** max(0, child.quick_deaths - 1), DELAY_MAX_MS)
            self._report_end(child, status, f"; it starts again in {delay_ms / 1000:g} s")
            child.restart_at_s = now_s + delay_ms / 1000
        elif now_s >= child.restart_at_s:
            nice = 0 if child.name == SUPERVISOR else self._joiner_nice
            try:
                self._spawn(child.name, child.quick_deaths, nice)
            except OSError as error:  # no memory, process or file descriptor is left
                self.report(f"{child.name} cannot be started now: {error.strerror}; trying again")
                child.restart_at_s = now_s + SPAWN_RETRY_S

    def _report_end(self, child: Child, status: int, consequence: str) -> None:
        how = f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"
        words = self.last_words(child)
        self.report(f"{child.name} {how}{f': {words}' if words else ''}{consequence}")

    def _spawn(self, name: str, quick_deaths: int = 0, nice: int = 0) -> None:
        with self._open_log(name) as log:
            log_begin = log.tell() if log.seekable() else 0
            process = subprocess.Popen(
                self._command(name),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # Ctrl-C in the terminal reaches only this process, which then ends all in order.
                start_new_session=True,
                env=os.environ | ({priority.LOWERED: "1"} if nice else {}),
            )
        if nice:
            priority.lower(process.pid, nice)
        self.children[name] = Child(name, process, time.monotonic(), quick_deaths, log_begin)

    def _open_log(self, name: str):
        """The log of a process; /dev/null where none can be opened, for it can serve without."""
        path = self.log_path(name)
        try:
            make_private_file(path)
            return path.open("ab")
        except OSError as error:
            self.report(f"{name} has no log: {path}: {error.strerror}")
            return open(os.devnull, "ab")

    def _command(self, name: str) -> list[str]:
        module = "launch.supervise" if name == SUPERVISOR else "launch.rank"
        command = [
            sys.executable,
            "-m",
            module,
            f"--run_dir={self.run_dir}",
            f"--parent_pid={os.getpid()}",
        ]
        rank = [] if name == SUPERVISOR else [f"--rank={name.removeprefix('rank')}"]
        return command + self._arguments + rank

    def log_path(self, name: str) -> pathlib.Path:
        return self.run_dir / "logs" / f"{name}.log"

    def last_words(self, child: Child) -> str:
        """The reason that a process gave in its log for its end; '' if it gave none."""
        try:
            with self.log_path(child.name).open("rb") as log:
                log.seek(max(child.log_begin, log.seek(0, os.SEEK_END) - LAST_WORDS_BYTES))
                text = log.read().decode(errors="replace")
        except OSError:  # the log was removed
            return ""
        return find_last_words(text, child.process.pid)

    def log_tail(self, name: str) -> str:
        """The last lines of a log; '' if there is none."""
        if not self.log_path(name).exists():
            return ""
        lines = self.log_path(name).read_text(errors="replace").splitlines()
        return "\n".join(lines[-LOG_TAIL_LINES:])

    @property
    def url(self) -> str:
        """Where the supervisor of this cluster serves. Raises OSError or ValueError before that."""
        endpoint = json.loads((self.run_dir / ENDPOINT).read_text())
        child = self.children.get(SUPERVISOR)
        if child is not None and endpoint.get("pid") != child.process.pid:
            raise ConnectionError("the supervisor has not written its address yet")
        return f"http://{endpoint['http_host']}:{endpoint['http_port']}"

    async def status(self, session: aiohttp.ClientSession) -> dict | None:
        """The supervisor's status, or None while it does not answer."""
        try:
            url, headers = self.url + "/v1/fault_tolerance/status", admin_headers(self.run_dir)
            async with session.get(url, headers=headers) as response:
                return await response.json()
        except (aiohttp.ClientError, OSError, ValueError, TimeoutError):
            return None

    async def wait_for(self, wanted, deadline_s: float, what: str, poll_ms: int = 100) -> dict:
        """The first status for which `wanted(status)` holds.

        Raises:
            ClusterFailed: `deadline_s` passed, or the cluster gave up.
        """
        ends_s, problems = time.monotonic() + deadline_s, []
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=2.0)) as session:
            while time.monotonic() < ends_s:
                if self.failure is not None:
                    self.keep_run_dir()
                    raise ClusterFailed(self.failure)
                status = await self.status(session)
                problems = problems if status is None else status.get("problems", [])
                if status is not None and wanted(status):
                    self.was_healthy = True
                    return status
                await asyncio.sleep(poll_ms / 1000)
        self.keep_run_dir()
        raise ClusterFailed(
            f"{what} did not happen within {deadline_s:.0f} s; logs are in {self.run_dir}/logs"
            + "".join(f"\n{problem}" for problem in problems)
        )

    def stop(self, timeout_s: float = 5.0, drain_s: float = 0.0) -> None:
        """Ends all processes: in order through the supervisor, by signals after the timeout.

        Args:
            timeout_s: For the processes to end.
            drain_s: Before that, for the supervisor to finish the answers that are under way.
                Another Ctrl-C ends them.
        """
        processes = [child.process for child in self.children.values()]
        for process in processes:
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)  # a stopped process cannot handle TERM
        if (child := self.children.get(SUPERVISOR)) is not None and child.process.poll() is None:
            child.process.terminate()
            try:
                child.process.wait(drain_s)
            except subprocess.TimeoutExpired:
                pass
            except KeyboardInterrupt:
                child.process.terminate()  # a second time: it hurries
        ends_s = time.monotonic() + timeout_s
        while (
            any(p.poll() is None for p in processes) and time.monotonic() < ends_s - timeout_s / 2
        ):
            time.sleep(0.02)
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
        for process in processes:
            try:
                process.wait(max(0.1, ends_s - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(5)
        if self._owner is not None:
            self._owner.release()
            self._owner = None
        if self._scratch is not None:
            self._scratch.remove()
            self._scratch = None

    def keep_run_dir(self) -> None:
        """Lets a temporary run directory stay, for its logs."""
        if self._scratch is not None:
            self._scratch.keep()
            self._scratch = None


def rank_name(rank: int) -> str:
    return f"rank{rank}"


def events_since(status: dict, begin_s: float) -> list[dict]:
    """The supervisor's events with `at_s` on the monotonic clock, converted from Unix time."""
    offset_s = time.time() - time.monotonic()
    dated = [event | {"at_s": event["time"] - offset_s} for event in status["events"]]
    return [event for event in dated if event["at_s"] >= begin_s]


def is_whole(status: dict) -> bool:
    """Every rank is active and serves in the committed epoch."""
    return status["state"] == "serving" and all(
        r["state"] == "active" and r["mode"] == "serving" and r["epoch"] == status["epoch"]
        for r in status["ranks"]
    )
