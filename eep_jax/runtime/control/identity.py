"""Identities of hosts and processes that hold across supervisor restarts and reused pids."""

import contextlib
import os
import pathlib
import signal

_PF_EXITING = 0x4  # of the flags in /proc/PID/stat, since Linux 2.2


def boot_id() -> str:
    """Equal for processes that share a pid namespace of one boot."""
    boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}"


def host_id(override: str = "") -> str:
    """Equal for processes that can map each other's memory and watch each other's pids.

    They share a boot, a pid namespace, and a network namespace, whose sockets hand memory over.
    `override` is returned instead if given: parts of one machine then count as several hosts.
    """
    return override or f"{boot_id()}/{os.stat('/proc/self/ns/net').st_ino}"


def start_ticks(pid: int) -> int:
    """Start time of a process in ticks since boot, which identifies reused pids; 0 if it is gone.

    Raises OSError if /proc cannot be read, most likely for lack of file descriptors.
    """
    fields = _stat(pid)
    return 0 if fields is None else int(fields[19])


def is_ending(pid: int) -> bool:
    """Whether a process has begun to exit, and runs no more user code.

    /proc shows this at once. A pidfd becomes readable only after the teardown, for which a GPU
    driver may take 0.2 s.
    """
    try:
        fields = _stat(pid)
    except OSError:
        return False  # unreadable for lack of file descriptors: not known to be gone
    return fields is None or fields[0] in "ZX" or bool(int(fields[6]) & _PF_EXITING)


def open_process(pid: int, ticks: int) -> int | None:
    """Opens a pidfd of the process that started at `ticks`; None if it has ended.

    Raises OSError as start_ticks does.
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
    """Sends SIGKILL to exactly this process; does nothing if it has ended."""
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)


def _stat(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat from the third one (state) on; None if the process is gone."""
    try:
        stat = pathlib.Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The command name may hold spaces and brackets; fields are counted after its end.
    return stat.rpartition(")")[2].split()
