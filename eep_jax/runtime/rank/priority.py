"""CPU priority of a process that is coming in: ranks that serve go first, until it offers itself.

Linux schedules by session where autogroups are on, and lets the processes of a session raise its
priority again; for a single process that takes a privilege. A launcher starts each process in its
own session and lowers it; the process raises it again. Without autogroups nothing is lowered.
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
    """Lowers the session led by process `pid` to `nice`; False where that is not possible."""
    try:
        return os.getsid(pid) == pid and _write(pid, nice)
    except OSError as error:  # it is gone, the kernel is busy with others, or has no autogroups
        _log.info("process %d starts at full priority: %s", pid, error)
        return False


def restore_priority() -> bool:
    """Undoes `lower` for this process; True if its priority is full now."""
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
    """`nice` of the session of a process. Raises OSError without autogroups."""
    text = pathlib.Path(f"/proc/{pid}/autogroup").read_text()
    found = re.search(r"nice (-?\d+)", text)
    return int(found[1]) if found else 0


def _write(pid: int, nice: int) -> bool:
    pathlib.Path(f"/proc/{pid}/autogroup").write_text(str(nice))
    return True
