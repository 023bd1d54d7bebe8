"""Launch configuration of dispatch on a GPU, chosen by shape."""

import dataclasses

from pallas_kernels.device import SM_COUNT
from pallas_kernels.grouping import tile_rows_for

BLOCKS_PER_SM = 8


@dataclasses.dataclass(frozen=True)
class DispatchConfig:
    """Launch configuration.

    Args:
        blocks: most warpgroups that send.
        tile_rows: rows of the expert GEMM's tiles, for which received rows are listed.
        groups: warpgroups of a block, 1, 2, 4 or 8; 0 for as many as the lists need.
        stand_in: also post the flags of the other ranks, to measure one rank of a loopback alone.
    """

    blocks: int = SM_COUNT * BLOCKS_PER_SM
    tile_rows: int = 64
    groups: int = 0
    stand_in: bool = False


def config_for(tokens: int, choices: int, slots_per_rank: int) -> DispatchConfig:
    """The configuration for T tokens with K choices each, if every rank sends as many."""
    return DispatchConfig(tile_rows=tile_rows_for(tokens * choices / slots_per_rank))
