"""How combine is launched; chosen by shape."""

import dataclasses

from pallas_kernels.device import SM_COUNT

BLOCKS_PER_SM = 8


@dataclasses.dataclass(frozen=True)
class CombineConfig:
    """Blocks at most of the kernel that sends results home, and of the one that sums them."""

    send_blocks: int = SM_COUNT * BLOCKS_PER_SM
    sum_blocks: int = SM_COUNT * BLOCKS_PER_SM
