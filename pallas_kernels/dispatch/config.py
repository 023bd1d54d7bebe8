"""How dispatch is launched on a GPU; chosen by shape."""

import dataclasses

from pallas_kernels.device import SM_COUNT
from pallas_kernels.expert_gemm.config import tile_rows_for

BLOCKS_PER_SM = 8


@dataclasses.dataclass(frozen=True)
class DispatchConfig:
    """`blocks` at most, one token each at a time. Received rows are listed in tiles of `tile_rows`,
    the expert GEMM's."""

    blocks: int = SM_COUNT * BLOCKS_PER_SM
    tile_rows: int = 64


def config_for(tokens: int, choices: int, slots_per_rank: int) -> DispatchConfig:
    """The configuration for T tokens with K choices each, where every rank sends as many."""
    return DispatchConfig(tile_rows=tile_rows_for(tokens * choices / slots_per_rank))
