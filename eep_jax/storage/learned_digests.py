"""Digests of weights whose files come with none: written at the first load, compared at later ones.

`eep_digests.json` lies beside the weights, or, where nothing can be written there, in the user's
cache; $EEP_DIGEST_DIR replaces both. It says what the bytes were when they were first read on this
storage: damage from then on is found, damage from before is not. `launch.convert --verify` compares
whole directories, also with the checksums that a download from the Hugging Face Hub leaves.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import logging
import os
import pathlib
import tempfile
import threading
from collections.abc import Iterable, Sequence

import numpy as np

from eep_jax.errors import CheckpointError
from eep_jax.storage.blocks import Block, Files, Target, Worker
from eep_jax.storage.digests import BLOCK_BYTES, block_digest, of_blocks

_log = logging.getLogger(__name__)

FILE = "eep_digests.json"
VARIABLE = "EEP_DIGEST_DIR"
MODE = 0o644  # whoever may read the weights may compare them, whatever the umask of a rank is
WRITES_MAX = 5  # tries to have an entry in the file, against processes that write at the same time

Span = tuple[pathlib.Path, int, int]  # file, first byte, last byte + 1


class LearnedDigests:
    """The digest file of one directory of weights. Thread-safe; several processes may use it.

    Example:
        >>> import tempfile
        >>> known = LearnedDigests(pathlib.Path(tempfile.mkdtemp()))
        >>> [known.compare("expert/000", "xxh3-4m:1", []) for _ in range(2)]
        [False, True]
    """

    def __init__(self, root: pathlib.Path):
        self._root, self._lock = pathlib.Path(root), threading.Lock()
        self.path = _path_for(self._root)
        self._known = self._read()
        self.problem = ""  # why digests are not kept; '' while they are

    def compare(self, name: str, found: str, files: Iterable[pathlib.Path]) -> bool:
        """Compares the digest of a weight with the known one, or keeps it if there is none.

        Args:
            name: Of the weight.
            found: Its digest now.
            files: Where its bytes are, for the message.

        Returns:
            Whether there was a digest to compare with.

        Raises:
            CheckpointError: The bytes are not those of the first load.
        """
        known = self._known.get(name)
        if known is None and (known := self._keep(name, found)) is None:
            return False
        if known != found:
            names = ", ".join(sorted({str(path) for path in files}))
            raise CheckpointError(
                f"{name} of {self._root} has digest {found}, it had {known} when it was first "
                f"loaded; a file is damaged, restore it from a copy: {names}. If the weights were "
                f"replaced on purpose, remove {self.path}"
            )
        return True

    def _keep(self, name: str, found: str) -> str | None:
        """Writes a new digest; returns the one of another process that was there before."""
        with self._lock:
            self._known[name] = found
            try:
                for _ in range(WRITES_MAX):
                    before = self._write()
                    if before.get(name, found) != found:
                        self._known[name] = before[name]
                        return before[name]
                    if name in self._read():
                        break
                self.problem = ""
            except OSError as error:
                self.problem = f"{self.path}: {error.strerror}"
                _log.warning("digests of %s are not kept: %s", self._root, self.problem)
        return None

    def _read(self) -> dict[str, str]:
        try:
            found = json.loads(self.path.read_text())
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{self.path} is not readable: {error}; remove it, and digests are learned anew"
            ) from error
        if not isinstance(found, dict) or not all(isinstance(v, str) for v in found.values()):
            raise CheckpointError(f"{self.path} holds no digests; remove it")
        return found

    def _write(self) -> dict[str, str]:
        """Adds to the file what it lacks; returns what it had, which was there first."""
        with _locked(self.path):
            before = self._read()
            merged = self._known | before
            fresh = self.path.with_name(f"{FILE}.{os.getpid()}.{threading.get_ident()}")
            try:
                fresh.write_text(json.dumps(merged, indent=0, sort_keys=True) + "\n")
                fresh.chmod(MODE)
                os.replace(fresh, self.path)
            finally:
                fresh.unlink(missing_ok=True)
        return before


def digest_of(spans: Sequence[Span]) -> str:
    """The digest of these bytes, one span after the other; see `digests`."""
    files, buffer = Files(), np.empty(BLOCK_BYTES, np.uint8)
    blocks = []
    try:
        for path, start, end in spans:
            for at in range(start, end, BLOCK_BYTES):
                part = buffer[: min(BLOCK_BYTES, end - at)]
                files.read(path, at, part)
                blocks.append(block_digest(part))
    finally:
        files.close()
    return of_blocks(blocks)


@dataclasses.dataclass(frozen=True)
class StoredDigestBlock:
    """A block that is stored otherwise than it is loaded: its digest is of the stored bytes."""

    block: Block
    spans: Sequence[Span]

    def load_into(self, worker: Worker, target: Target, *, in_place: bool, checked: bool) -> bytes:
        self.block.load_into(worker, target, in_place=in_place, checked=False)
        return digest_of(self.spans).encode() if checked else b""  # out of the page cache


def _path_for(root: pathlib.Path) -> pathlib.Path:
    """Where the digests of a directory are, or are to be."""
    name = f"{hashlib.blake2b(str(root.resolve()).encode(), digest_size=12).hexdigest()}.json"
    if directory := os.environ.get(VARIABLE):
        return pathlib.Path(directory) / name
    if (root / FILE).exists() or os.access(root, os.W_OK):
        return root / FILE
    return _cache() / "eep-jax" / "digests" / name


def _cache() -> pathlib.Path:
    if directory := os.environ.get("XDG_CACHE_HOME"):
        return pathlib.Path(directory)
    try:
        return pathlib.Path.home() / ".cache"
    except RuntimeError:  # a user without a home, as in containers
        return pathlib.Path(tempfile.gettempdir())


@contextlib.contextmanager
def _locked(path: pathlib.Path):
    """Keeps other processes of this host from writing; without locks, they merge all the same."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(f".{path.name}.lock"), "ab") as lock:
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
