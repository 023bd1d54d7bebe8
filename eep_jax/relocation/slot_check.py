"""Fingerprints of slots, computed on their device: no byte goes to the host for a check.

The first rank that loads an expert compares its bytes with the manifest's digest and records the
slot's fingerprint: 64 bits that the device computes in one pass. From then on a copy of that expert
is right if its slot has the same fingerprint.
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

VERSION = 2  # of the function that `fingerprint` computes
# Slots per launch. On a GPU, a launch and the transfer of its result cost more than a slot.
SLOTS_AT_ONCE = {"cpu": 1, "cuda": 8}
COLUMNS = 1024  # words that one block of a GPU sums


def fingerprints(words: UInt[Array, "S W"], slots: Int32[Array, "N"]) -> UInt32[Array, "N 2"]:
    """The fingerprint of each of these slots of a bank, viewed as words (`SlabLayout.words`).

    Compilers turn 32-bit words on one axis into loops at memory speed.
    """
    of = lambda slot: fingerprint(lax.dynamic_index_in_dim(words, slot, keepdims=False))
    return jnp.stack([of(slots[index]) for index in range(slots.shape[0])])


def fingerprint(words: UInt[Array, "W"]) -> UInt32[Array, "2"]:
    """Two sums over all words of a slot, each word mixed with its position.

    A change of one word always changes the first sum, since mixing is bijective in the word. Other
    damage keeps both sums with a chance of 2**-64. The order of the sums does not matter, so every
    device and compilation computes the same.
    """
    words = words.astype(jnp.uint32)
    position = lax.iota(jnp.uint32, words.shape[0])
    mixed = words * jnp.uint32(0x9E3779B1) ^ position * jnp.uint32(0x85EBCA6B)
    for shift, factor in ((15, 0x2C1B3C6D), (12, 0x297A2D39)):
        mixed = (mixed ^ mixed >> shift) * jnp.uint32(factor)
    mixed = mixed ^ mixed >> 15
    return _sums(mixed, mixed * (2 * position + 1) ^ mixed >> 7)


def _sums(first: UInt32[Array, "W"], second: UInt32[Array, "W"]) -> UInt32[Array, "2"]:
    """Both sums in one pass: XLA vectorises one axis on a CPU, and maps rows to GPU blocks."""
    if platform() == "gpu":
        columns = math.gcd(first.shape[0], COLUMNS)
        zero, add = jnp.uint32(0), lambda a, b: (a[0] + b[0], a[1] + b[1])
        rows = tuple(part.reshape(-1, columns) for part in (first, second))
        first, second = lax.reduce(rows, (zero, zero), add, (1,))
    return jnp.stack([jnp.sum(part, dtype=jnp.uint32) for part in (first, second)])


class SlotCheck:
    """Expected and actual fingerprints of slots. Call from the engine thread only."""

    def __init__(
        self,
        heap: SymmetricHeap,
        layout: SlabLayout,
        name_of: Callable[[int], str],
        directory: pathlib.Path | None = None,
        obtain: Callable = lambda lower, arguments: lower().compile(),
    ):
        """Compiles and runs the program once, so create it before the rank serves.

        Call `of` and `learn` while no step runs: JAX must not read a slot that is being written.

        Args:
            heap: The heap that holds the bank.
            layout: Layout of the slab.
            name_of: `ExpertStore.content_name`.
            directory: Where ranks of this host share known fingerprints; None to share none.
            obtain: Compiles the program, or loads it from a store of executables.
        """
        self._directory, self._name_of = directory, name_of
        self._layout = f"{VERSION} {layout.bank.dtype} {layout.padded_shape}"
        self._words, self._at_once = device_array(heap, layout.words), SLOTS_AT_ONCE[heap.device]
        arguments = (self._words, np.zeros(self._at_once, np.int32))
        self._compiled = obtain(lambda: jax.jit(fingerprints).lower(*arguments), arguments)
        self.of([0])  # the first run of a program takes longer
        self._known: dict[int, str] = {}

    def of(self, slots: Sequence[int]) -> list[str]:
        """The fingerprints of these slots; all are launched before one is read back."""
        found = []
        for begin in range(0, len(slots), self._at_once):
            batch = np.full(self._at_once, slots[begin], np.int32)
            few = slots[begin : begin + self._at_once]
            batch[: len(few)] = few
            found.append(self._compiled(self._words, batch))
        rows = np.concatenate([np.asarray(part) for part in found])[: len(slots)] if found else ()
        return ["".join(f"{int(word):08x}" for word in row) for row in rows]

    def known(self, expert: int) -> str | None:
        """The fingerprint of this expert; None if no rank has learned it."""
        if expert not in self._known and (path := self._path(expert)) is not None:
            try:
                found = path.read_text()
            except OSError:
                return None
            if len(found) == 16:
                self._known[expert] = found
        return self._known.get(expert)

    def mismatch(self, expert: int, found: str) -> str | None:
        """Why a slot with the fingerprint `found` does not hold a known expert; None if it does."""
        expected = self.known(expert)
        if found == expected:
            return None
        return f"fingerprint {found} of expert {expert}, expected {expected}"

    def learn(self, expert: int, slot: int) -> None:
        """Records the fingerprint of a slot whose expert was compared with its digest."""
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
        except OSError as error:  # other processes learn it themselves
            _log.warning("cannot store the fingerprint of expert %d: %s", expert, error)

    def _path(self, expert: int) -> pathlib.Path | None:
        if self._directory is None:
            return None
        name = f"{self._layout} {self._name_of(expert)}"
        return self._directory / hashlib.blake2b(name.encode(), digest_size=16).hexdigest()
