"""Write-ahead journal of the supervisor: records on disk, which the next supervisor replays.

A record has `kind`, `time` (Unix seconds) and facts; `journal_format` has the form of its line.

Appended records are written, not synced: they survive the end of the process, not of the machine.
A loss of power loses what the kernel had not written back, at the end of the file; a file that
replaces the journal is synced before it does, so that the rest is never lost with it.

While the disk takes nothing (full, read-only, broken), the journal is off: records are left out,
`problem` says why, and `compact` with the whole state turns it on again.
"""

import contextlib
import logging
import os
import pathlib
import time

from eep_jax.runtime.history.journal_format import encode_record, header_of, read_journal

_log = logging.getLogger(__name__)

MODE = 0o600  # records hold prompts and answers


class Journal:
    """Appends to `path`. The owner compacts it when it `is_full`, that is, above `bytes_max`.

    If it is still above `bytes_max` after compaction, the next one waits until its size doubles
    (amortised cost).

    Example:
        >>> import tempfile
        >>> journal = Journal(pathlib.Path(tempfile.mkdtemp()) / "journal.jsonl")
        >>> journal.append("dead", {"rank": 1})["kind"], journal.problem
        ('dead', '')
        >>> journal.close()
        >>> [record["kind"] for record in replay(journal.path)]
        ['dead']
    """

    def __init__(self, path: pathlib.Path, config: dict | None = None, bytes_max: int = 16 << 20):
        """Opens the journal, without a last line that was cut off.

        Args:
            path: The file; made if missing.
            config: Facts of the run, for the header of a new journal.
            bytes_max: See above.

        Raises:
            RunDirError: A line is damaged, or another version wrote the file.
            OSError: The file cannot be opened.
        """
        self.path, self._bytes_max, self._full_at = pathlib.Path(path), bytes_max, bytes_max
        found = read_journal(self.path)
        self._header = encode_record(header_of(found.config or config or {}))
        self.problem = ""  # why records are not written; '' while they are
        self._fd = _open(self.path)
        self._size = os.fstat(self._fd).st_size
        if self._size > found.end:
            _log.warning(
                "%s: cut off %d bytes of a record that was never acknowledged",
                self.path,
                self._size - found.end,
            )
            os.ftruncate(self._fd, found.end)
            self._size = found.end
        if self._size:
            self._renew()
        else:
            self._write(self._header)

    def append(self, kind: str, facts: dict) -> dict:
        """Writes one record and returns it; while `problem` says why, only returns it."""
        record = facts | {"time": time.time(), "kind": kind}
        line = encode_record(record)
        if not self.problem:
            self._write(line)
        return record

    @property
    def is_full(self) -> bool:
        return self._size > self._full_at

    def compact(self, records: list[dict]) -> bool:
        """Replaces the whole journal by `records`, atomically; returns whether that succeeded."""
        data = self._header + b"".join(encode_record(record) for record in records)
        if not self._replace(data):
            self._full_at = max(self._full_at, 2 * self._size)
            return False
        self._full_at = max(self._bytes_max, 2 * self._size)
        if self.problem:
            _log.warning("the journal is written again")
            self.problem = ""
        return True

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _renew(self) -> None:
        """Continues in a new file, so that a former owner's late records reach no reader."""
        if not self._replace(self.path.read_bytes()):
            _log.warning("the journal continues in its old file")

    def _write(self, line: bytes) -> None:
        """Writes a line wholly or not at all."""
        try:
            if os.write(self._fd, line) != len(line):
                raise OSError(0, "the disk took only a part of a record")
            self._size += len(line)
        except OSError as error:
            self._off(error)
            with contextlib.suppress(OSError):  # else its newline is missing, and readers drop it
                os.ftruncate(self._fd, self._size)

    def _replace(self, data: bytes) -> bool:
        fresh, fd = self.path.with_suffix(".new"), -1
        try:
            with contextlib.suppress(FileNotFoundError):
                fresh.unlink()
            fd = _open(fresh)
            _write_all(fd, data)
            os.fsync(fd)
            os.replace(fresh, self.path)
        except OSError as error:
            _log.warning("the journal cannot be replaced: %s", error.strerror or error)
            if fd >= 0:
                os.close(fd)
                with contextlib.suppress(OSError):
                    fresh.unlink()
            return False
        self.close()
        self._fd, self._size = fd, len(data)
        return True

    def _off(self, error: OSError) -> None:
        self.problem = (
            f"the journal is off: {self.path}: {error.strerror or error}. Requests are served, but "
            "those accepted now are lost if the supervisor ends; it continues once there is room"
        )
        _log.error("%s", self.problem)


def replay(path: pathlib.Path) -> list[dict]:
    """All whole records of a journal, oldest first; empty if there is none. Raises RunDirError."""
    return read_journal(path).records


def _open(path: pathlib.Path) -> int:
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
    fd = os.open(path, flags, MODE)
    if os.fstat(fd).st_mode & 0o777 != MODE:
        with contextlib.suppress(OSError):
            os.fchmod(fd, MODE)
    return fd


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
