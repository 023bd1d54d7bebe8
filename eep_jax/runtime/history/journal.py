"""Write-ahead journal of the supervisor: one JSON object per line.

A record has `kind`, `time` (Unix seconds) and facts. The next supervisor replays it; a truncated
last line is dropped. Lines are flushed but not synced: they survive the process, not the machine.
"""

import json
import os
import pathlib
import time


class Journal:
    """Appends to `path`. The owner compacts it when it `is_full`, that is, above `bytes_max`.

    If it is still above `bytes_max` after compaction, the next one waits until its size doubles
    (amortised cost).
    """

    def __init__(self, path: pathlib.Path, bytes_max: int = 16 << 20):
        self.path, self._bytes_max, self._full_at = pathlib.Path(path), bytes_max, bytes_max
        _drop_partial_line(self.path)
        self._file = self.path.open("a", encoding="utf-8")

    def append(self, kind: str, facts: dict) -> dict:
        """Writes one record and returns it."""
        record = facts | {"time": time.time(), "kind": kind}
        self._file.write(json.dumps(record, separators=(",", ":")) + "\n")
        self._file.flush()
        return record

    @property
    def is_full(self) -> bool:
        return self._file.tell() > self._full_at

    def compact(self, records: list[dict]) -> None:
        """Replaces the whole journal by `records`, atomically."""
        fresh = self.path.with_suffix(".new")
        with fresh.open("w", encoding="utf-8") as file:
            for record in records:
                file.write(json.dumps(record, separators=(",", ":")) + "\n")
        os.replace(fresh, self.path)
        self._file.close()
        self._file = self.path.open("a", encoding="utf-8")
        self._full_at = max(self._bytes_max, 2 * self._file.tell())

    def close(self) -> None:
        self._file.close()


def replay(path: pathlib.Path) -> list[dict]:
    """All complete records of a journal, oldest first; empty if there is no journal."""
    try:
        lines = pathlib.Path(path).read_text(encoding="utf-8", errors="replace").split("\n")
    except FileNotFoundError:
        return []
    records = []
    for line in lines[:-1]:  # the part behind the last newline is truncated
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and "kind" in record:
            records.append(record)
    return records


def _drop_partial_line(path: pathlib.Path) -> None:
    if not path.exists():
        return
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        with path.open("r+b") as file:
            file.truncate(whole)
