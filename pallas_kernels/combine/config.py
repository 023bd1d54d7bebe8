"""How combine is launched; chosen by shape."""

import dataclasses

SM_COUNT = 132  # of an H100 and an H200
BLOCKS_PER_SM = 8


@dataclasses.dataclass(frozen=True)
class CombineConfig:
    """Blocks at most of the kernel that sends results home, and of the one that sums them."""

    send_blocks: int = SM_COUNT * BLOCKS_PER_SM
    sum_blocks: int = SM_COUNT * BLOCKS_PER_SM
