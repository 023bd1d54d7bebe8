"""Runner of the parts of `multi_gpu`: each is a process with a deadline and a log."""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import time
from collections.abc import Sequence

from benchmarks.processes import NO_MULTICAST, start, tail

NO_TIME_S = 15.0  # with less than this left, a part is not begun
END_S = 20.0  # for a part that is over its time to end its own processes


@dataclasses.dataclass(frozen=True)
class Part:
    """One command. `group` is what --parts names; parts of a group run one after the other."""

    group: str
    name: str
    arguments: tuple[str, ...]  # after `python -m`
    deadline_s: float
    variables: tuple[tuple[str, str], ...] = ()


@dataclasses.dataclass(frozen=True)
class Done:
    """The end of a part."""

    part: Part
    status: str  # "done", "FAILED: ...", "not run: ..."
    seconds: float
    log: pathlib.Path

    @property
    def ok(self) -> bool:
        return self.status == "done"


def chosen(parts: Sequence[Part], groups: Sequence[str] | None) -> list[Part]:
    """The parts of these groups; without groups all. Raises ValueError naming the known ones."""
    known = list(dict.fromkeys(part.group for part in parts))
    if unknown := sorted(set(groups or ()) - set(known)):
        raise ValueError(f"{unknown} are not among {known}")
    return [part for part in parts if not groups or part.group in groups]


def run_part(part: Part, directory: pathlib.Path, left_s: float) -> Done:
    """Runs it in a process group of its own, which is killed once it is over its time."""
    log = directory / f"{part.name}.log"
    if left_s < NO_TIME_S:
        return Done(part, f"not run: {left_s:.0f} s are left", 0.0, log)
    deadline_s, begin_s = min(part.deadline_s, left_s - END_S / 2), time.monotonic()
    log.unlink(missing_ok=True)
    process = start(list(part.arguments), log, NO_MULTICAST | dict(part.variables))
    status = _await(process, deadline_s)
    return Done(part, status, time.monotonic() - begin_s, log)


def _await(process: subprocess.Popen, deadline_s: float) -> str:
    try:
        status = process.wait(deadline_s)
    except subprocess.TimeoutExpired:
        _end(process)
        return f"FAILED: not done after {deadline_s:.0f} s"
    finally:
        if process.poll() is None:
            _end(process)
    return "done" if status == 0 else f"FAILED: status {status}"


def _end(process: subprocess.Popen) -> None:
    """In order if it can (its children end with it), else by force; only its own session."""
    for number, wait_s in ((signal.SIGINT, END_S / 2), (signal.SIGKILL, END_S / 2)):
        try:
            os.killpg(process.pid, number)
            process.wait(wait_s)
            return
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def run_parts(
    parts: Sequence[Part], directory: pathlib.Path, budget_s: float, say=print
) -> list[Done]:
    """Runs them in turn within `budget_s`, also after a failure; the ends of failed logs are
    shown. What is done is in `parts.json` after each of them."""
    directory.mkdir(parents=True, exist_ok=True)
    ends_s, found = time.monotonic() + budget_s, []
    for part in parts:
        say(f"{part.name}: {' '.join(part.arguments)}")
        done = run_part(part, directory, ends_s - time.monotonic())
        say(f"{part.name}: {done.status} after {done.seconds:.0f} s")
        if not done.ok and done.log.exists():
            say(tail(done.log))
        found.append(done)
        kept = [{"part": d.part.name, "status": d.status, "seconds": d.seconds} for d in found]
        (directory / "parts.json").write_text(json.dumps(kept, indent=1))
    return found
