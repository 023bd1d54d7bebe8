"""Our own checkpoints: an Orbax checkpoint whose experts can be read singly, and its manifest.

    <directory>/manifest.json   model sizes, and the digest of every weight
    <directory>/weights/        Orbax: {"dense": {name: array}, "experts": {"e007": [L 3 F D]}}

A weight is one uncompressed chunk (`"chunks": "plain"` in the manifest): a file of its bytes, which
several threads read into their target, comparing digests meanwhile. Orbax restores all weights or
just the named leaves; checkpoints with other chunks are read that way.

A checkpoint that was written piece by piece (`conversion.py`), with only one piece in memory, has
`"layout": "pieces"` in its manifest, and one Orbax checkpoint for each piece:

    <directory>/weights/e007/        {"e007": [L 3 F D]}, one chunk
    <directory>/weights/layers.12/   {name: array} of the dense weights of a layer
    <directory>/weights/embed/ ...   and of each other part of the decoder
"""

import dataclasses
import functools
import json
import pathlib

import jax
import numpy as np
import orbax.checkpoint as ocp

from eep_jax.config import ModelConfig
from eep_jax.errors import CheckpointError
from eep_jax.heap.copies import empty_aligned
from eep_jax.models.weights import expert_name
from eep_jax.storage.block_loader import Job, load_arrays, wrong_digest
from eep_jax.storage.blocks import ArrayTarget, Block, Target
from eep_jax.storage.digests import digest, digest_like, is_blocked
from eep_jax.storage.expert_store import ExpertStore
from eep_jax.storage.manifest import MANIFEST, read_manifest
from eep_jax.storage.plain_arrays import PlainArray, plain_array, save_plain

WEIGHTS = "weights"
PIECES = "pieces"  # value of "layout" in the manifest
PLAIN = "plain"  # value of "chunks" in the manifest


def save_checkpoint(
    directory, config: ModelConfig, dense: dict, experts: dict, facts: dict
) -> None:
    """Writes a checkpoint.

    Args:
        directory: Where to write; must not exist.
        config: Sizes of the model.
        dense: Weights outside the experts, by name.
        experts: Weights `[L 3 F D]` by name of expert, all of one dtype.
        facts: JSON values that the manifest keeps.

    Raises:
        FileExistsError: The directory exists.
    """
    root = pathlib.Path(directory).absolute()
    root.mkdir(parents=True)
    save_plain(root / WEIGHTS, {"dense": dense, "experts": experts})
    manifest = {
        "model": dataclasses.asdict(config),
        "dtype": str(next(iter(experts.values())).dtype),
        "chunks": PLAIN,
        "facts": facts,
        "dense": {name: digest(array) for name, array in dense.items()},
        "experts": {name: digest(array) for name, array in experts.items()},
    }
    (root / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")


def require_same_model(root, found: ModelConfig, wanted: ModelConfig, but=()) -> None:
    """Raises CheckpointError if the models differ; names the fields, apart from `but`."""
    has, should = dataclasses.asdict(found), dataclasses.asdict(wanted)
    differ = [name for name in should if name not in but and has[name] != should[name]]
    if differ:
        wrong = {name: f"{has[name]} instead of {should[name]}" for name in differ}
        raise CheckpointError(f"{root} holds another model than the configuration: {wrong}")


class Checkpoint(ExpertStore):
    """An ExpertStore over our own checkpoint. Every weight is compared with its digest.

    Args:
        directory: What `save_checkpoint` or a conversion wrote.

    Raises:
        CheckpointError: The manifest is missing or malformed.
    """

    def __init__(self, directory):
        self.root = pathlib.Path(directory).absolute()
        self.manifest, self.model = read_manifest(self.root)

    def require_model(self, model: ModelConfig) -> None:
        """Raises CheckpointError unless the checkpoint is of this model."""
        require_same_model(self.root, self.model, model)

    def read_dense(self) -> dict[str, np.ndarray]:
        """All weights outside the experts, by name, in the stored dtype."""
        return self._read("dense", list(self.manifest["dense"]))

    def read_weight(self, name: str) -> np.ndarray:
        """One weight outside the experts. Raises CheckpointError."""
        return self._read("dense", [name])[name]

    def read_experts(self, experts: list[int]) -> dict[int, np.ndarray]:
        """See ExpertStore."""
        self._require_experts(experts)
        if not experts:
            return {}
        arrays = self._read("experts", [expert_name(e) for e in experts])
        return {e: arrays[expert_name(e)] for e in experts}

    def expert_job(self, expert: int, target: Target, in_place: bool) -> Job | None:
        """See ExpertStore; None if the expert is not one plain chunk."""
        name = expert_name(expert)
        expected = self.manifest["experts"].get(name, "")
        if not self._is_plain or not is_blocked(expected):
            return None
        blocks = functools.partial(self._blocks, "experts", name, self.model.expert_shape)
        return Job(self._title("experts", name), blocks, target, expected, in_place)

    @property
    def _is_plain(self) -> bool:
        return self.manifest.get("chunks") == PLAIN

    def _title(self, part: str, name: str) -> str:
        return f"{part} weight {name} of {self.root}"

    def _array(self, part: str, name: str) -> PlainArray:
        pieces = self.manifest.get("layout") == PIECES
        directory = f"{piece_of(name)}/{name}" if pieces else f"{part}.{name}"
        return plain_array(self.root / WEIGHTS / directory)

    def _blocks(self, part: str, name: str, shape: tuple[int, ...]) -> list[Block]:
        try:
            array = self._array(part, name)
            if array.shape != tuple(shape):
                raise CheckpointError(f"shape {list(array.shape)}, expected {list(shape)}")
            return list(array.blocks())
        except (CheckpointError, OSError) as error:
            raise self._unreadable([name], error) from error

    def _unreadable(self, names: list[str], error: Exception) -> CheckpointError:
        return CheckpointError(f"cannot read {names} of {self.root / WEIGHTS}: {error}")

    def _read(self, part: str, names: list[str]) -> dict[str, np.ndarray]:
        expected = {name: self.manifest[part][name] for name in names}
        try:
            if self._is_plain and all(map(is_blocked, expected.values())):
                return self._load(part, expected)
            arrays = self._restore(part, names)
        except CheckpointError:
            raise
        except Exception as error:  # Orbax and TensorStore raise many types for unreadable storage
            raise self._unreadable(names, error) from error
        for name, array in arrays.items():
            found = digest_like(expected[name], array)
            if found != expected[name]:
                raise wrong_digest(self._title(part, name), found, expected[name])
        return arrays

    def _load(self, part: str, expected: dict[str, str]) -> dict[str, np.ndarray]:
        arrays, jobs = {}, []
        for name, wanted in expected.items():
            try:
                head = self._array(part, name)
            except CheckpointError as error:
                raise self._unreadable([name], error) from error
            arrays[name] = empty_aligned(head.shape, head.dtype)
            blocks = functools.partial(self._blocks, part, name, head.shape)
            target = ArrayTarget(arrays[name])
            jobs.append(Job(self._title(part, name), blocks, target, wanted, in_place=True))
        load_arrays(jobs)
        return arrays

    def _restore(self, part: str, names: list[str]) -> dict[str, np.ndarray]:
        weights = self.root / WEIGHTS
        if self.manifest.get("layout") != PIECES:
            return restore(weights, {part: names})[part]
        by_piece: dict[str, list[str]] = {}
        for name in names:
            by_piece.setdefault(piece_of(name), []).append(name)
        found = {}
        for piece, members in by_piece.items():
            found |= restore(weights / piece, members)
        return found


def restore(directory: pathlib.Path, names) -> dict:
    """Reads these leaves of an Orbax checkpoint; `names` is a list, or a dict of lists.

    Raises whatever Orbax and TensorStore raise.
    """
    wanted = _leaves(names)
    arguments = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
    restore_them = ocp.args.PyTreeRestore(item=wanted, restore_args=arguments, partial_restore=True)
    with open_orbax() as checkpointer:
        return jax.tree.map(np.asarray, checkpointer.restore(directory, args=restore_them))


def _leaves(names) -> dict:
    if isinstance(names, dict):
        return {part: _leaves(inner) for part, inner in names.items()}
    return dict.fromkeys(names, 0)


def piece_of(name: str) -> str:
    """The piece of a weight: `layers.12` for `layers/12/router/kernel`, `e007` for itself."""
    first, *rest = name.split("/")
    return f"{first}.{rest[0]}" if first == "layers" else first


def open_orbax() -> ocp.Checkpointer:
    """A checkpointer that restores every layout of Orbax."""
    return ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
