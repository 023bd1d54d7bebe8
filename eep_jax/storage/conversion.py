"""Conversion of weights into our checkpoint, piece by piece, resumable after a kill.

    <out>/conversion.jsonl   first the origin, then one line for each finished piece
    <out>/weights/<piece>/   see `checkpoint.py`
    <out>/manifest.json      written last; then conversion.jsonl is removed

A piece is finished once its bytes were read back and compared. A piece without a line, which a
killed process left half done, is written again; one with a line is not touched again.
"""

import collections.abc
import contextlib
import dataclasses
import errno
import fcntl
import json
import math
import os
import pathlib
import shutil
from typing import Protocol, runtime_checkable

import numpy as np

from eep_jax.errors import CheckpointError
from eep_jax.heap.copies import empty_aligned
from eep_jax.models.weights import expert_name
from eep_jax.storage.block_loader import load_array
from eep_jax.storage.checkpoint import MANIFEST, PIECES, PLAIN, WEIGHTS, piece_of
from eep_jax.storage.digests import digest
from eep_jax.storage.expert_store import ExpertStore
from eep_jax.storage.plain_arrays import plain_array, save_plain

RECORD = "conversion.jsonl"
LOCK = "conversion.lock"
FREE_SPARE_BYTES = 64 << 20  # that must stay free beyond the weights
# Files beside the weights, for tokenizers, chat templates and people.
COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
)


@runtime_checkable
class SourceOfWeights(ExpertStore, Protocol):
    """What is converted, such as `hugging_face.HuggingFaceCheckpoint`."""

    root: pathlib.Path

    def read_dense(self) -> collections.abc.Mapping[str, np.ndarray]: ...

    def source_files(self) -> list[pathlib.Path]: ...


@dataclasses.dataclass(frozen=True)
class Step:
    """A finished piece, number `done` of `total`; `fresh` if this run wrote it."""

    done: int
    total: int
    piece: str
    fresh: bool


class Conversion:
    """Converts `source` into a directory, one process at a time."""

    def __init__(self, source: SourceOfWeights, out):
        """Reads the headers of the source; writes nothing yet.

        Args:
            source: The weights to convert.
            out: A directory that does not exist, is empty, or holds an unfinished conversion of
                the same files.
        """
        self._source, self.root = source, pathlib.Path(out).absolute()
        self._dense = source.read_dense()
        self._pieces = _pieces(self._dense, source.model.experts)
        self._origin = _origin(source)
        self._digests: dict[str, dict[str, str]] = {}  # by finished piece, then by name

    @property
    def is_finished(self) -> bool:
        """Whether the directory holds the whole result.

        Raises CheckpointError if it holds the result of another source.
        """
        if (self.root / RECORD).exists() or not (self.root / MANIFEST).exists():
            return False
        manifest = json.loads((self.root / MANIFEST).read_text())
        if manifest.get("facts", {}).get("converted") != self._origin:
            raise CheckpointError(
                f"{self.root} holds a checkpoint of another source than {self._source.root}; "
                "choose another directory, or remove it"
            )
        return True

    @property
    def total(self) -> int:
        """The number of pieces."""
        return len(self._pieces)

    def run(self) -> collections.abc.Iterator[Step]:
        """Writes the missing pieces, with at most two copies of one piece in memory.

        Yields:
            Each piece in order, including those that were finished before.

        Raises:
            CheckpointError: The directory holds other files or is in use by another process, a
                disk is too small or loses bytes, or the source is not readable.
        """
        if self.root.resolve() == self._source.root.resolve():
            raise CheckpointError(f"{self.root} is where the weights come from; choose another")
        self._make_directory()
        self._refuse_others()
        with self._lock():
            self._take_up()
            yield from self._write_pieces()
            self._finish()

    def _make_directory(self) -> None:
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"cannot create {self.root}: {error.strerror}") from error

    def _refuse_others(self) -> None:
        found = sorted({path.name for path in self.root.iterdir()} - {LOCK})
        if found and RECORD not in found:
            raise CheckpointError(
                f"{self.root} holds {found[:5]} and no {RECORD}, so it is not an unfinished "
                "conversion; choose a directory that is empty or does not exist"
            )

    @contextlib.contextmanager
    def _lock(self):
        with (self.root / LOCK).open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise CheckpointError(
                    f"another process is converting into {self.root}; wait for it, or end it"
                ) from error
            yield

    def _take_up(self) -> None:
        """Reads which pieces are finished, and removes unfinished ones."""
        lines = _whole_lines(self.root / RECORD)
        if not lines:
            self._append({"converted": self._origin})
        elif lines[0].get("converted") != self._origin:
            raise CheckpointError(
                f"{self.root} was begun from other files than {self._source.root} holds now, or "
                "with another dtype; remove it to start over, or choose another directory"
            )
        (self.root / WEIGHTS).mkdir(exist_ok=True)
        for line in lines[1:]:
            if (self.root / WEIGHTS / line["piece"]).is_dir():
                self._digests[line["piece"]] = line["digests"]
        for path in (self.root / WEIGHTS).iterdir():
            if path.name not in self._digests:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        self._check_room([p for p in self._pieces if p not in self._digests])

    def _write_pieces(self) -> collections.abc.Iterator[Step]:
        for done, piece in enumerate(self._pieces, start=1):
            fresh = piece not in self._digests
            if fresh:
                self._write(piece)
            yield Step(done, self.total, piece, fresh)

    def _write(self, piece: str) -> None:
        arrays = self._read(piece)
        digests = {name: digest(array) for name, array in arrays.items()}
        directory = self.root / WEIGHTS / piece
        try:
            save_plain(directory, arrays)
            del arrays
            stored = {name: _stored(directory / name) for name in digests}
        except Exception as error:  # Orbax and TensorStore raise many types
            raise CheckpointError(self._why(piece, error)) from error
        for name, found in stored.items():
            if found != digests[name]:
                raise CheckpointError(
                    f"{name} in {directory} differs from what was written: the storage loses or "
                    "changes bytes; check it, and run the same command again"
                )
        self._append({"piece": piece, "digests": digests})
        self._digests[piece] = digests

    def _read(self, piece: str) -> dict[str, np.ndarray]:
        expert = self._pieces[piece]
        if isinstance(expert, int):
            return {piece: self._source.read_experts([expert])[expert]}
        return {name: self._dense[name] for name in expert}

    def _append(self, line: dict) -> None:
        try:
            with (self.root / RECORD).open("a") as file:
                file.write(json.dumps(line) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise CheckpointError(self._why(RECORD, error)) from error

    def _finish(self) -> None:
        for name in COMPANIONS:
            if (path := self._source.root / name).is_file():
                shutil.copyfile(path, self.root / name)
        experts = {expert_name(e) for e in range(self._source.model.experts)}
        digests = {n: d for piece in self._pieces for n, d in self._digests[piece].items()}
        manifest = {
            "model": dataclasses.asdict(self._source.model),
            "dtype": self._source.manifest["dtype"],
            "layout": PIECES,
            "chunks": PLAIN,
            "facts": {"converted": self._origin},
            "dense": {name: d for name, d in digests.items() if name not in experts},
            "experts": {name: d for name, d in digests.items() if name in experts},
        }
        fresh = self.root / f"{MANIFEST}.new"
        with fresh.open("w") as file:
            file.write(json.dumps(manifest, indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(self.root / MANIFEST)
        (self.root / RECORD).unlink()
        (self.root / LOCK).unlink(missing_ok=True)

    def _check_room(self, pieces) -> None:
        """Raises CheckpointError if the disk has too little space for these pieces."""
        model = self._source.model
        itemsize = np.dtype(self._source.manifest["dtype"]).itemsize
        experts = sum(isinstance(self._pieces[piece], int) for piece in pieces)
        needed = experts * math.prod(model.expert_shape) * itemsize
        if experts < len(pieces):
            needed += (
                model.dense_parameters
                * itemsize
                * (len(pieces) - experts)
                // max(1, len(self._pieces) - model.experts)
            )
        free = shutil.disk_usage(self.root).free
        if free < needed + FREE_SPARE_BYTES:
            raise CheckpointError(
                f"{self.root} has {free / 2**30:.1f} GiB free, and {needed / 2**30:.1f} GiB are "
                "still to be written; make room, or choose another directory"
            )

    def _why(self, piece: str, error: Exception) -> str:
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        if full or "No space left" in str(error) or "Disk quota exceeded" in str(error):
            return (
                f"the disk of {self.root} is full while writing {piece}; make room and run the "
                "same command again: it goes on where it stopped"
            )
        return f"cannot write {piece} of {self.root}: {error}"


def _pieces(dense: collections.abc.Mapping, experts: int) -> dict[str, list[str] | int]:
    """{piece: names of its weights, or number of its expert}, in the order of writing."""
    found: dict[str, list[str] | int] = {}
    for name in dense:
        found.setdefault(piece_of(name), []).append(name)
    return found | {expert_name(e): e for e in range(experts)}


def _origin(source: SourceOfWeights) -> dict:
    """Identifies a set of files by sizes and times, without reading them."""
    files = {}
    for path in source.source_files():
        facts = path.stat()
        files[path.name] = [facts.st_size, facts.st_mtime_ns]
    return {"name": source.model.name, "dtype": source.manifest["dtype"], "files": files}


def _stored(directory: pathlib.Path) -> str:
    """The digest of an array, read back from storage."""
    head = plain_array(directory)
    array = empty_aligned(head.shape, head.dtype)
    return digest(load_array(array, str(directory), head.blocks))


def _whole_lines(record: pathlib.Path) -> list[dict]:
    """The complete lines; an incomplete last one is cut off the file."""
    if not record.exists():
        return []
    text = record.read_text()
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        os.truncate(record, len(whole.encode()))
    return [json.loads(line) for line in whole.splitlines()]
