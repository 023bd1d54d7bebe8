"""Which process is which: what survives a restart of the supervisor and the reuse of a pid."""

import contextlib
import os
import pathlib
import signal

_PF_EXITING = 0x4  # of the flags in /proc/PID/stat, since Linux 2.2


def boot_id() -> str:
    """Same for all processes whose pids mean the same: one boot, one pid namespace."""
    boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}"


def host_id(override: str = "") -> str:
    """Same for all processes that can map each other's memory and watch each other's pids.

    That takes one boot, one pid namespace and one network namespace, since memory is handed over
    through sockets of the latter. `override` is what an operator says instead, to have parts of
    one machine count as several hosts.
    """
    return override or f"{boot_id()}/{os.stat('/proc/self/ns/net').st_ino}"


def start_ticks(pid: int) -> int:
    """When the process started, in ticks since boot; 0 if there is none. Tells reused pids.

    Raises OSError where that cannot be seen: most likely too many files are open here.
    """
    fields = _stat(pid)
    return 0 if fields is None else int(fields[19])


def is_ending(pid: int) -> bool:
    """Whether a process is seen to have begun to exit: it will run no more code of its own.

    The kernel says so at once. Until it has taken the process apart, and a pidfd tells, a GPU's
    driver may need a fifth of a second.
    """
    try:
        fields = _stat(pid)
    except OSError:
        return False  # what this process cannot look at, for want of descriptors, is not gone
    return fields is None or fields[0] in "ZX" or bool(int(fields[6]) & _PF_EXITING)


def open_process(pid: int, ticks: int) -> int | None:
    """A pidfd of the process that started at `ticks`, or None if it has ended.

    Raises OSError where that cannot be seen, as start_ticks does.
    """
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return None
    same = False
    try:
        same = start_ticks(pid) == ticks
    finally:
        if not same:
            os.close(pidfd)
    return pidfd if same else None


def kill_process(pidfd: int) -> None:
    """SIGKILL to exactly that process; nothing if it has ended."""
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)


def _stat(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat from the third one, the state, on; None without a process."""
    try:
        stat = pathlib.Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The command name may hold spaces and brackets; fields are counted after its end.
    return stat.rpartition(")")[2].split()
