"""The definition of a slot's fingerprint, in unbounded integers."""

import numpy as np


def by_hand(weights: np.ndarray) -> tuple[int, int]:
    """Both sums of `slot_check.fingerprint` of these bytes, word by word."""
    words = np.ascontiguousarray(weights).reshape(-1).view(np.uint32)
    first = second = 0
    for position, word in enumerate(words.tolist()):
        x = (word * 0x9E3779B1 ^ position * 0x85EBCA6B) & 0xFFFFFFFF
        for shift, factor in ((15, 0x2C1B3C6D), (12, 0x297A2D39)):
            x = (x ^ x >> shift) * factor & 0xFFFFFFFF
        x ^= x >> 15
        first, second = first + x, second + (x * (2 * position + 1) & 0xFFFFFFFF ^ x >> 7)
    return first & 0xFFFFFFFF, second & 0xFFFFFFFF
