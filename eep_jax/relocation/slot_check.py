"""Whether a slot holds its expert, found out where the slot is: no byte goes to the host for it.

Whoever brings an expert for the first time compares its bytes with the manifest's digest, and then
learns a fingerprint of them: 64 bits that the device computes of a slot while it reads it once.
From then on a copy of that expert is right if its slot has the same fingerprint.
"""

import hashlib
import logging
import math
import os
import pathlib
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int32, UInt, UInt32

from eep_jax.heap.arrays import device_array
from eep_jax.heap.heap import SymmetricHeap
from eep_jax.models.expert_bank import SlabLayout
from pallas_kernels.device import platform

_log = logging.getLogger(__name__)

VERSION = 2  # of what `fingerprint` computes
# Slots that one launch looks at. A launch and the way of its answer cost a GPU more than a slot.
SLOTS_AT_ONCE = {"cpu": 1, "cuda": 8}
COLUMNS = 1024  # words that one block of a GPU adds up


def fingerprints(words: UInt[Array, "S W"], slots: Int32[Array, "N"]) -> UInt32[Array, "N 2"]:
    """The fingerprint of each of these slots of a bank, given as plain words (`SlabLayout.words`).

    Words of 32 bits in one axis: what compilers turn into loops that keep up with memory.
    """
    of = lambda slot: fingerprint(lax.dynamic_index_in_dim(words, slot, keepdims=False))
    return jnp.stack([of(slots[index]) for index in range(slots.shape[0])])


def fingerprint(words: UInt[Array, "W"]) -> UInt32[Array, "2"]:
    """Two sums over all words of a slot, each word mixed with its position.

    A word that changes alone always changes the first sum: mixing is one to one in the word. That
    other damage keeps both is as likely as guessing 64 bits. The order of the sums does not matter,
    so every device and every compilation finds the same.
    """
    words = words.astype(jnp.uint32)
    position = lax.iota(jnp.uint32, words.shape[0])
    mixed = words * jnp.uint32(0x9E3779B1) ^ position * jnp.uint32(0x85EBCA6B)
    for shift, factor in ((15, 0x2C1B3C6D), (12, 0x297A2D39)):
        mixed = (mixed ^ mixed >> shift) * jnp.uint32(factor)
    mixed = mixed ^ mixed >> 15
    return _sums(mixed, mixed * (2 * position + 1) ^ mixed >> 7)


def _sums(first: UInt32[Array, "W"], second: UInt32[Array, "W"]) -> UInt32[Array, "2"]:
    """Both in one pass. XLA turns one axis into vectors on a CPU, and rows into blocks on a GPU."""
    if platform() == "gpu":
        columns = math.gcd(first.shape[0], COLUMNS)
        zero, add = jnp.uint32(0), lambda a, b: (a[0] + b[0], a[1] + b[1])
        rows = tuple(part.reshape(-1, columns) for part in (first, second))
        first, second = lax.reduce(rows, (zero, zero), add, (1,))
    return jnp.stack([jnp.sum(part, dtype=jnp.uint32) for part in (first, second)])


class SlotCheck:
    """The fingerprints that slots should have, and those that they have. Of the engine's thread.

    What one rank learns others read from `directory`; None keeps it in this process alone.
    """

    def __init__(
        self,
        heap: SymmetricHeap,
        layout: SlabLayout,
        name_of: Callable[[int], str],
        directory: pathlib.Path | None = None,
        obtain: Callable = lambda lower, arguments: lower().compile(),
    ):
        """`name_of` names the content of an expert; `obtain` may know another way to a program.

        Compiles, and runs once: do it before anybody serves. Call `of` and `learn` while no step
        runs, since JAX must not read a slot that is being written.
        """
        self._directory, self._name_of = directory, name_of
        self._layout = f"{VERSION} {layout.bank.dtype} {layout.padded_shape}"
        self._words, self._at_once = device_array(heap, layout.words), SLOTS_AT_ONCE[heap.device]
        arguments = (self._words, np.zeros(self._at_once, np.int32))
        self._compiled = obtain(lambda: jax.jit(fingerprints).lower(*arguments), arguments)
        self.of([0])  # the first run of a program takes longer
        self._known: dict[int, str] = {}

    def of(self, slots: Sequence[int]) -> list[str]:
        """The fingerprints of what these slots hold; all are on their way before one is read."""
        found = []
        for begin in range(0, len(slots), self._at_once):
            batch = np.full(self._at_once, slots[begin], np.int32)
            few = slots[begin : begin + self._at_once]
            batch[: len(few)] = few
            found.append(self._compiled(self._words, batch))
        rows = np.concatenate([np.asarray(part) for part in found])[: len(slots)] if found else ()
        return ["".join(f"{int(word):08x}" for word in row) for row in rows]

    def known(self, expert: int) -> str | None:
        """What a slot with this expert must have, if anybody has learned it."""
        if expert not in self._known and (path := self._path(expert)) is not None:
            try:
                said = path.read_text()
            except OSError:
                return None
            if len(said) == 16:
                self._known[expert] = said
        return self._known.get(expert)

    def mismatch(self, expert: int, found: str) -> str | None:
        """Why a slot with the fingerprint `found` does not hold a known expert; None if it does."""
        expected = self.known(expert)
        if found == expected:
            return None
        return f"fingerprint {found} of expert {expert}, expected {expected}"

    def learn(self, expert: int, slot: int) -> None:
        """The slot holds the expert, as its digest said."""
        if self.known(expert) is not None:
            return
        (self._known[expert],) = self.of([slot])
        if (path := self._path(expert)) is None:
            return
        draft = path.with_name(f"{path.name}.{os.getpid()}")
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            draft.write_text(self._known[expert])
            os.replace(draft, path)
        except OSError as error:  # another process learns it for itself
            _log.warning("the fingerprint of expert %d is not kept: %s", expert, error)

    def _path(self, expert: int) -> pathlib.Path | None:
        if self._directory is None:
            return None
        name = f"{self._layout} {self._name_of(expert)}"
        return self._directory / hashlib.blake2b(name.encode(), digest_size=16).hexdigest()
