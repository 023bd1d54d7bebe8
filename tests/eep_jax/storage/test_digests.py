"""Promises of digests: of bytes, the same by blocks and threads, and older ones still count."""

import hashlib

import numpy as np
import pytest

from eep_jax.storage.digests import (
    BLOCK_BYTES,
    PREFIX,
    block_digest,
    digest,
    digest_like,
    is_blocked,
    of_blocks,
)


@pytest.mark.parametrize("nbytes", [0, 1, BLOCK_BYTES, BLOCK_BYTES + 1, 5 * BLOCK_BYTES + 3])
def test_threads_and_blocks_say_the_same(nbytes):
    data = np.random.default_rng(0).integers(0, 256, nbytes, np.uint8)
    blocks = [data[at : at + BLOCK_BYTES] for at in range(0, nbytes, BLOCK_BYTES)]
    assert digest(data) == of_blocks(map(block_digest, blocks))
    for at in {0, nbytes // 2, nbytes - 1} if nbytes else ():
        changed = data.copy()
        changed[at] ^= 1
        assert digest(changed) != digest(data)


def test_a_digest_says_how_it_was_made_and_older_ones_still_count():
    array = np.arange(6, dtype=np.float32)
    assert digest(array).startswith(PREFIX) and is_blocked(digest(array))
    older = hashlib.blake2b(array.tobytes(), digest_size=16).hexdigest()
    assert not is_blocked(older) and digest_like(older, array) == older
    assert digest_like(digest(array), array) == digest(array)


def test_blocks_in_another_order_are_another_array():
    data = np.random.default_rng(0).integers(0, 256, 2 * BLOCK_BYTES, np.uint8)
    assert digest(data) != digest(np.roll(data, BLOCK_BYTES))
