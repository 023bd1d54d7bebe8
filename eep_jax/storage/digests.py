"""Names for the content of arrays: fast enough that checking costs little beside reading.

`xxh3-4m:<32 hexadecimal digits>`: each 4 MiB of the bytes have their 128 bits of XXH3, and the
128 bits of XXH3 over those are the name. So blocks may be read, and checked, by several threads in
any order. It finds damage; it is no proof against somebody who may write the manifest, too. A name
without a prefix is 128 bits of BLAKE2b over all bytes, as checkpoints had them at first.
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
_ALONE_BYTES = 4 * BLOCK_BYTES  # up to here threads are not worth their while


def digest(array: np.ndarray) -> str:
    """Names the content of an array, which is its bytes in C order."""
    data = _bytes(array)
    blocks = [data[at : at + BLOCK_BYTES] for at in range(0, data.size, BLOCK_BYTES)]
    if data.size <= _ALONE_BYTES:
        return of_blocks(map(block_digest, blocks))
    with concurrent.futures.ThreadPoolExecutor(threads()) as pool:
        return of_blocks(pool.map(block_digest, blocks))


def block_digest(data: np.ndarray) -> bytes:
    """Of at most BLOCK_BYTES contiguous bytes. Lets go of the interpreter meanwhile."""
    return xxhash.xxh3_128_digest(data)


def of_blocks(blocks: Iterable[bytes]) -> str:
    """The name of an array whose blocks have these digests, in their order."""
    return PREFIX + xxhash.xxh3_128_hexdigest(b"".join(blocks))


def is_blocked(name: str) -> bool:
    """Whether a name is made of digests of blocks."""
    return name.startswith(PREFIX)


def digest_like(name: str, array: np.ndarray) -> str:
    """The name of this array's content, computed as `name` was."""
    if is_blocked(name):
        return digest(array)
    return hashlib.blake2b(_bytes(array).data, digest_size=16).hexdigest()


def threads() -> int:
    """How many threads read and check at once."""
    return max(1, min(THREADS_MAX, len(os.sched_getaffinity(0))))


def _bytes(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)
