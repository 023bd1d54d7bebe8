"""Division of a step's queries into tiles, and of the keys that they see into chunks."""

import numpy as np

GROUP_ROWS = 64  # rows of one warpgroup's matrix instruction: queries x heads of one key head
GROUPS = 2  # warpgroups that multiply, each with its own queries
PAGE_TOKENS = 64  # keys of one page, and of one product
CHUNK_TOKENS = 4096  # keys whose softmax is summed in one piece; pieces are added in their order
FIELDS = ("row", "queries", "sequence", "position", "chunk")  # of one item


def tile_queries(heads_per_key: int) -> int:
    """Queries of one tile."""
    return GROUPS * (GROUP_ROWS // heads_per_key)


def items_max(tokens: int, sequences: int, context: int, heads_per_key: int) -> int:
    """Most items that `plan_items` can return for so many tokens of so many sequences."""
    tiles = tokens // tile_queries(heads_per_key) + min(tokens, 2 * sequences)
    return tiles * chunks_of(context)


def chunks_of(context: int) -> int:
    return -(-context // CHUNK_TOKENS)


def plan_items(sequences: np.ndarray, positions: np.ndarray, heads_per_key: int) -> np.ndarray:
    """The work of one step, largest items first.

    Consecutive rows of one sequence at consecutive positions form tiles of up to `tile_queries`
    queries; a tile has one item for each chunk of keys that its last query sees. Rows with a
    negative position are left out. With 8 heads per key head (tiles of 16 queries), a row of
    sequence 5 at position 70 and 20 rows of sequence 2 from position 0 on give

        row queries sequence position chunk
          0       1        5       70     0
          1      16        2        0     0
         17       4        2       16     0

    Args:
        sequences: int32 [T], row of the page table of each token.
        positions: int32 [T], position of each token; negative for an empty row.
        heads_per_key: query heads that share a key head.

    Returns:
        int32 [W, 5], columns as in FIELDS.
    """
    size, items, rows = tile_queries(heads_per_key), [], len(positions)
    empty = positions < 0
    breaks = (np.diff(sequences) != 0) | (np.diff(positions) != 1) | empty[:-1]
    breaks = np.flatnonzero(breaks) + 1
    for start, end in zip([0, *breaks], [*breaks, rows], strict=True):
        if start == end or positions[start] < 0:
            continue
        for row in range(start, end, size):
            queries = min(size, end - row)
            first = int(positions[row])
            chunks = (first + queries - 1) // CHUNK_TOKENS + 1
            items += [(row, queries, int(sequences[row]), first, c) for c in range(chunks)]
    seen = lambda item: (
        min(item[3] + item[1], (item[4] + 1) * CHUNK_TOKENS) - item[4] * CHUNK_TOKENS
    )
    items.sort(key=seen, reverse=True)
    return np.array(items, np.int32).reshape(-1, len(FIELDS))
