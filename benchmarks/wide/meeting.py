"""How the processes of a benchmark meet: small JSON files in a directory that all of them see."""

import json
import pathlib
import time

POLL_S = 0.001


class Meeting:
    """One rank's view. Every wait ends after `deadline_s`, with a TimeoutError that says for whom.

    Each name is used once: the files stay, and tell afterwards how far a rank came.
    """

    def __init__(self, directory: pathlib.Path, rank: int, ranks: int, deadline_s: float):
        self.directory, self.rank, self.ranks = directory, rank, ranks
        self._deadline_s = deadline_s
        directory.mkdir(parents=True, exist_ok=True)

    def share(self, name: str, value=None) -> list:
        """Waits until all ranks have said something under this name; what they said, by rank."""
        part = self.directory / f"{name}.{self.rank}.part"
        part.write_text(json.dumps(value))
        part.rename(self.directory / f"{name}.{self.rank}")
        ends_s = time.monotonic() + self._deadline_s
        return [self._read(self.directory / f"{name}.{rank}", ends_s) for rank in range(self.ranks)]

    def _read(self, path: pathlib.Path, ends_s: float):
        while not path.exists():
            if time.monotonic() > ends_s:
                raise TimeoutError(f"{path} was not written within {self._deadline_s:.0f} s")
            time.sleep(POLL_S)
        return json.loads(path.read_text())
