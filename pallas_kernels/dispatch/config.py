"""How dispatch is launched on a GPU; chosen by shape."""

import dataclasses

from pallas_kernels.device import SM_COUNT
from pallas_kernels.expert_gemm.config import tile_rows_for

BLOCKS_PER_SM = 8


@dataclasses.dataclass(frozen=True)
class DispatchConfig:
    """`blocks` warpgroups at most send. Received rows are listed in tiles of `tile_rows`, the
    expert GEMM's. `groups` warpgroups make a block: 1, 2, 4 or 8, or 0 for as many as the lists
    need."""

    blocks: int = SM_COUNT * BLOCKS_PER_SM
    tile_rows: int = 64
    groups: int = 0


def config_for(tokens: int, choices: int, slots_per_rank: int) -> DispatchConfig:
    """The configuration for T tokens with K choices each, where every rank sends as many."""
    return DispatchConfig(tile_rows=tile_rows_for(tokens * choices / slots_per_rank))
