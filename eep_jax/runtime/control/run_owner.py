"""Ownership of a run directory: one supervisor, and one launcher, at a time.

Each owner has a term. Its file `supervisor.owner.TERM` is created exclusively, so of two claims to
a term one fails, on NFS and Lustre as well, where file locks may be local to a host or refused. The
file names host, process and start time; its modification time is the heartbeat. An owner of this
host lives as long as its process, one of another host as long as its heartbeats go on. The
highest term owns: an owner that finds a higher one steps down.
"""

import contextlib
import dataclasses
import errno
import json
import os
import pathlib
import socket
import time

from eep_jax.errors import RunDirError
from eep_jax.runtime.control.endpoint import ENDPOINT, NO_ROOM
from eep_jax.runtime.control.identity import boot_id, is_ending, start_ticks

SUPERVISOR, LAUNCHER = "supervisor", "launcher"
BEAT_MS = 1_000
SILENT_MS = 6_000  # without a heartbeat, an owner on another host counts as ended
PATIENCE_MS = 1_000  # for an owner on this host that is about to end
POLL_MS = 50
TRIES_MAX = 20
NO_LINKS = (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP)  # of file systems without hard links
FILE_BYTES = 512  # of an owner's file, so that a full disk lets the next owner reuse it


class RunTaken(RunDirError):
    """Another process owns the run directory."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Owner:
    """Content of an owner's file. `boot` identifies a boot and a pid namespace."""

    term: int
    boot: str
    hostname: str
    pid: int
    ticks: int
    since: float  # Unix seconds

    @property
    def is_of_this_host(self) -> bool:
        return self.boot == boot_id()

    @property
    def is_this_process(self) -> bool:
        return self.is_of_this_host and self.pid == os.getpid()


class RunOwner:
    """An ownership that was claimed. `beat` at least every BEAT_MS; `release` at the end."""

    def __init__(self, run_dir: pathlib.Path, role: str, owner: Owner):
        self._run_dir, self._role, self.owner = run_dir, role, owner
        self.path = _path(run_dir, role, owner.term)
        self._beat_s = time.monotonic()

    def beat(self) -> None:
        """Shows that the owner lives, at most every BEAT_MS.

        Raises:
            RunTaken: Another process has taken the run directory over.
        """
        now_s = time.monotonic()
        if now_s - self._beat_s < BEAT_MS / 1000:
            return
        self.check()

    def check(self) -> None:
        """`beat` without its interval: to be called before what only the owner may do."""
        self._beat_s = time.monotonic()
        terms = _terms(self._run_dir, self._role)
        if terms and terms[-1] != self.owner.term:
            raise self._taken(_read(self._run_dir, self._role, terms[-1]))
        found = _read(self._run_dir, self._role, self.owner.term)
        if terms and found.pid and found != self.owner:
            raise self._taken(found)  # terms begin anew in a directory that was released
        with contextlib.suppress(OSError):  # where nothing can be written, nobody takes over
            if terms:
                os.utime(self.path)
            else:  # it was removed by hand
                _create(self._run_dir, self._role, self.owner, None)

    def release(self) -> None:
        """Gives the directory up. Idempotent."""
        if _read(self._run_dir, self._role, self.owner.term) != self.owner:
            return
        with contextlib.suppress(OSError):
            self.path.unlink()

    def _taken(self, other: Owner) -> RunTaken:
        return RunTaken(
            f"{self._run_dir} was taken over by {_who(self._role, other)}; this process ends, and "
            "leaves the ranks to it"
        )


def claim(run_dir: pathlib.Path, role: str = SUPERVISOR, silent_ms: int = SILENT_MS) -> RunOwner:
    """Makes this process the owner of a run directory.

    Waits for the heartbeat of an owner on another host for up to `silent_ms`.

    Args:
        run_dir: The directory, which exists.
        role: SUPERVISOR or LAUNCHER; each has its own owner.
        silent_ms: How long no heartbeat may come until such an owner counts as ended.

    Returns:
        The ownership.

    Raises:
        RunTaken: A living process owns it; the message says which, and where it serves.
        OSError: The directory cannot be written.

    Example:
        >>> import tempfile
        >>> run_dir = pathlib.Path(tempfile.mkdtemp())
        >>> mine = claim(run_dir)
        >>> mine.owner.term, mine.path.name
        (1, 'supervisor.owner.1')
        >>> mine.release()
    """
    run_dir = pathlib.Path(run_dir)
    for _ in range(TRIES_MAX):
        last = _last_owner(run_dir, role)
        if last is not None and _lives(run_dir, role, last, silent_ms):
            raise RunTaken(_refusal(run_dir, role, last))
        mine = Owner(
            term=1 if last is None else last.term + 1,
            boot=boot_id(),
            hostname=socket.gethostname(),
            pid=os.getpid(),
            ticks=start_ticks(os.getpid()),
            since=time.time(),
        )
        try:
            _create(run_dir, role, mine, last)
        except FileExistsError:
            continue  # another process was faster; it lives, or ended at once
        for term in _terms(run_dir, role):
            if term < mine.term:
                with contextlib.suppress(OSError):
                    _path(run_dir, role, term).unlink()
        return RunOwner(run_dir, role, mine)
    raise RunTaken(f"{run_dir} is claimed by other processes again and again; stop all but one")


def check_free(run_dir: pathlib.Path, role: str = SUPERVISOR, silent_ms: int = SILENT_MS) -> None:
    """Raises RunTaken if a living process owns the directory in this role."""
    last = _last_owner(run_dir, role)
    if last is not None and _lives(run_dir, role, last, silent_ms):
        raise RunTaken(_refusal(run_dir, role, last))


def _path(run_dir: pathlib.Path, role: str, term: int) -> pathlib.Path:
    return run_dir / f"{role}.owner.{term}"


def _terms(run_dir: pathlib.Path, role: str) -> list[int]:
    try:
        names = os.listdir(run_dir)
    except OSError:
        return []
    begin = f"{role}.owner."
    words = (name.removeprefix(begin) for name in names if name.startswith(begin))
    return sorted(int(word) for word in words if word.isdecimal())


def _last_owner(run_dir: pathlib.Path, role: str) -> Owner | None:
    terms = _terms(run_dir, role)
    return _read(run_dir, role, terms[-1]) if terms else None


def _read(run_dir: pathlib.Path, role: str, term: int) -> Owner:
    """The owner of a term. One whose file cannot be read counts as on another host."""
    try:
        fields = json.loads(_path(run_dir, role, term).read_text())
        return Owner(**{**fields, "term": term})
    except (OSError, ValueError, TypeError):
        return Owner(term=term, boot="?", hostname="?", pid=0, ticks=0, since=0.0)


def _lives(run_dir: pathlib.Path, role: str, owner: Owner, silent_ms: int) -> bool:
    if owner.is_this_process:
        return True
    if not owner.is_of_this_host:
        return _beats(_path(run_dir, role, owner.term), silent_ms)
    ends_s = time.monotonic() + PATIENCE_MS / 1000
    while _runs(owner):
        if time.monotonic() > ends_s:
            return True
        time.sleep(POLL_MS / 1000)
    return False


def _runs(owner: Owner) -> bool:
    try:
        return start_ticks(owner.pid) == owner.ticks and not is_ending(owner.pid)
    except OSError:  # no file descriptor is left to look at it
        return True


def _beats(path: pathlib.Path, silent_ms: int) -> bool:
    """Whether the heartbeat changes. Compares it with itself: clocks of hosts differ."""
    first, ends_s = _beat_of(path), time.monotonic() + silent_ms / 1000
    while time.monotonic() < ends_s:
        if (now := _beat_of(path)) != first:
            return now is not None  # None: released meanwhile
        time.sleep(POLL_MS / 1000)
    return False


def _beat_of(path: pathlib.Path) -> int | None:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)  # on NFS, opening asks the server
    except OSError:
        return None
    try:
        return os.fstat(fd).st_mtime_ns
    finally:
        os.close(fd)


def _create(run_dir: pathlib.Path, role: str, owner: Owner, last: Owner | None) -> None:
    """Creates the file of a term with its content. Raises FileExistsError if the term is taken."""
    path = _path(run_dir, role, owner.term)
    text = json.dumps(dataclasses.asdict(owner)).ljust(FILE_BYTES - 1) + "\n"
    fresh = run_dir / f".{role}.owner.{owner.pid}.{owner.ticks}"
    try:
        _write(fresh, text, os.O_TRUNC)
        os.link(fresh, path)
    except FileExistsError:
        raise
    except OSError as error:
        if error.errno in NO_LINKS:
            _write(path, text, os.O_EXCL)
        elif error.errno in NO_ROOM and last is not None:
            os.link(_path(run_dir, role, last.term), path)  # its blocks are there already
            with path.open("r+") as file:
                file.write(text)
        else:
            raise
    finally:
        with contextlib.suppress(OSError):
            fresh.unlink()


def _write(path: pathlib.Path, text: str, how: int) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | how, 0o600)
    with open(fd, "w") as file:
        file.write(text)


def _who(role: str, owner: Owner) -> str:
    if not owner.pid:
        return f"another {role}"
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(owner.since))
    return f"the {role} with pid {owner.pid} on host {owner.hostname}, since {since}"


def _refusal(run_dir: pathlib.Path, role: str, owner: Owner) -> str:
    try:
        at = json.loads((run_dir / ENDPOINT).read_text())
        serves = f", which serves at http://{at['http_host']}:{at['http_port']}"
    except (OSError, ValueError, LookupError, TypeError):
        serves = ""
    return (
        f"{run_dir} is in use by {_who(role, owner)}{serves}; end that one first, or give another "
        "--run_dir"
    )
