"""Verification of a directory of weights: every one is read and compared with its digest."""

import hashlib
import pathlib
import re
from collections.abc import Iterator
from typing import NamedTuple

from eep_jax.errors import CheckpointError
from eep_jax.models.weights import expert_name
from eep_jax.storage.checkpoint import Checkpoint
from eep_jax.storage.hugging_face import HuggingFaceCheckpoint

_SHA256 = re.compile(r"[0-9a-f]{64}")


class Verified(NamedTuple):
    """One weight or file; `problem` is '' if it is what it should be."""

    name: str
    problem: str


def verify(store: Checkpoint | HuggingFaceCheckpoint) -> Iterator[Verified]:
    """Reads everything, and yields each weight; of a Hugging Face directory its files, too.

    A file is compared with the SHA-256 that a download from the Hugging Face Hub leaves: the name
    of the blob in its cache, or the metadata beside a local copy. A directory with neither, and
    without digests from before, is only read, and its digests are kept for the next time.
    """
    for expert in range(store.model.experts):
        yield _tried(expert_name(expert), lambda e=expert: store.read_experts([e]))
    if isinstance(store, Checkpoint):
        for name in store.manifest["dense"]:
            yield _tried(name, lambda name=name: store.read_weight(name))
        return
    dense = store.read_dense()
    for name in dense:
        yield _tried(name, lambda name=name: dense[name])
    for path in store.source_files():
        if wanted := hub_sha256(path):
            found = sha256_of(path)
            differs = f"{path} has SHA-256 {found}, the Hub's is {wanted}; download it again"
            yield Verified(path.name, "" if found == wanted else differs)


def hub_sha256(path: pathlib.Path) -> str:
    """The SHA-256 of a file on the Hugging Face Hub; '' where its download left none."""
    blob = path.resolve().name
    if path.is_symlink() and _SHA256.fullmatch(blob):
        return blob
    metadata = path.parent / ".cache" / "huggingface" / "download" / f"{path.name}.metadata"
    try:
        lines = metadata.read_text().splitlines()  # commit, ETag, time
    except OSError:
        return ""
    return lines[1] if len(lines) > 1 and _SHA256.fullmatch(lines[1]) else ""


def sha256_of(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _tried(name: str, read) -> Verified:
    try:
        read()
    except (CheckpointError, OSError) as error:
        return Verified(name, str(error))
    return Verified(name, "")
