"""Promises of digests: independent of blocks and threads; older kinds stay valid."""

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
def test_threads_and_blocks_do_not_change_the_digest(nbytes):
    data = np.random.default_rng(0).integers(0, 256, nbytes, np.uint8)
    blocks = [data[at : at + BLOCK_BYTES] for at in range(0, nbytes, BLOCK_BYTES)]
    assert digest(data) == of_blocks(map(block_digest, blocks))
    for at in {0, nbytes // 2, nbytes - 1} if nbytes else ():
        changed = data.copy()
        changed[at] ^= 1
        assert digest(changed) != digest(data)


def test_a_digest_names_its_kind_and_older_kinds_stay_valid():
    array = np.arange(6, dtype=np.float32)
    assert digest(array).startswith(PREFIX) and is_blocked(digest(array))
    older = hashlib.blake2b(array.tobytes(), digest_size=16).hexdigest()
    assert not is_blocked(older) and digest_like(older, array) == older
    assert digest_like(digest(array), array) == digest(array)


def test_blocks_in_another_order_are_another_array():
    data = np.random.default_rng(0).integers(0, 256, 2 * BLOCK_BYTES, np.uint8)
    assert digest(data) != digest(np.roll(data, BLOCK_BYTES))
