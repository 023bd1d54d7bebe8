"""Digests of arrays, fast enough that checking costs little beside reading.

`xxh3-4m:<32 hexadecimal digits>` is the 128-bit XXH3 of the 128-bit XXH3 digests of each 4 MiB of
the bytes, so several threads may read and check blocks in any order. It detects damage, but not an
attacker who can write the manifest, too. A digest without prefix is 128 bits of BLAKE2b over all
bytes, which the first checkpoints stored.
"""

import concurrent.futures
import hashlib
import os
from collections.abc import Iterable

import numpy as np
import xxhash

BLOCK_BYTES = 4 << 20
PREFIX = "xxh3-4m:"
THREADS_MAX = 8
_ALONE_BYTES = 4 * BLOCK_BYTES  # up to here threads cost more than they save


def digest(array: np.ndarray) -> str:
    """The digest of an array's bytes in C order, with the prefix `xxh3-4m:`."""
    data = _bytes(array)
    blocks = [data[at : at + BLOCK_BYTES] for at in range(0, data.size, BLOCK_BYTES)]
    if data.size <= _ALONE_BYTES:
        return of_blocks(map(block_digest, blocks))
    with concurrent.futures.ThreadPoolExecutor(threads()) as pool:
        return of_blocks(pool.map(block_digest, blocks))


def block_digest(data: np.ndarray) -> bytes:
    """The digest of at most BLOCK_BYTES contiguous bytes; releases the GIL."""
    return xxhash.xxh3_128_digest(data)


def of_blocks(blocks: Iterable[bytes]) -> str:
    """The digest of an array from those of its blocks, in order."""
    return PREFIX + xxhash.xxh3_128_hexdigest(b"".join(blocks))


def is_blocked(known: str) -> bool:
    """Whether a digest was computed from digests of blocks."""
    return known.startswith(PREFIX)


def digest_like(known: str, array: np.ndarray) -> str:
    """The digest of an array, of the same kind as the digest `known`."""
    if is_blocked(known):
        return digest(array)
    return hashlib.blake2b(_bytes(array).data, digest_size=16).hexdigest()


def threads() -> int:
    """Number of threads that read and check at once."""
    return max(1, min(THREADS_MAX, len(os.sched_getaffinity(0))))


def _bytes(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)
