"""A process that is on its way in leaves the cores to ranks that serve, until it offers itself.

Linux schedules by session ("autogroups", where they are on), and lets a session's own processes
raise its priority again, which that of a single process needs a privilege for. A launcher starts
each process in a session of its own and lowers it; the process takes it back. Where there are no
autogroups, nothing is lowered.
"""

import logging
import os
import pathlib
import re
import time

_log = logging.getLogger(__name__)

LOWERED = "EEP_PRIORITY_LOWERED"  # environment variable of a process whose launcher lowered it
RAISE_TRIES_S = 2.0  # the kernel takes about ten such changes per second, from all users together
_TRY_S = 0.05


def lower(pid: int, nice: int) -> bool:
    """Lowers the session of a process that leads it by so many steps of `nice`; whether it did."""
    try:
        return os.getsid(pid) == pid and _write(pid, nice)
    except OSError as error:  # it is gone, the kernel is busy with others, or has no autogroups
        _log.info("process %d starts at full priority: %s", pid, error)
        return False


def restore_priority() -> bool:
    """Ends what `lower` did to this process, if it did; whether its priority is full now."""
    if not os.environ.pop(LOWERED, "") or os.getsid(0) != os.getpid():
        return True
    ends_s = time.monotonic() + RAISE_TRIES_S
    while True:
        try:
            return not nice_of(os.getpid()) or _write(os.getpid(), 0)
        except OSError as error:
            if time.monotonic() >= ends_s:
                _log.warning("this process stays at low priority: %s", error)
                return False
            time.sleep(_TRY_S)


def nice_of(pid: int) -> int:
    """Of a process's session. Raises OSError where there are no autogroups."""
    text = pathlib.Path(f"/proc/{pid}/autogroup").read_text()
    found = re.search(r"nice (-?\d+)", text)
    return int(found[1]) if found else 0


def _write(pid: int, nice: int) -> bool:
    pathlib.Path(f"/proc/{pid}/autogroup").write_text(str(nice))
    return True
