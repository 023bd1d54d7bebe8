"""Launch configuration of combine on a GPU, chosen by shape."""

import dataclasses

from pallas_kernels.device import SM_COUNT

BLOCKS_PER_SM = 8


@dataclasses.dataclass(frozen=True)
class CombineConfig:
    """Launch configuration.

    Args:
        send_blocks: most blocks of the kernel that sends results home. More than the GPU runs at
            once, since blocks without work end soon.
        sum_blocks: most blocks of the kernel that sums them.
        sum_chunks: a thread of `combine_send` sums so many x 8 channels at a time (`per_rank`).
        stand_in: also post the flags of the other ranks, to measure one rank of a loopback alone.
    """

    send_blocks: int = SM_COUNT * BLOCKS_PER_SM * 8
    sum_blocks: int = SM_COUNT * BLOCKS_PER_SM
    sum_chunks: int = 4
    stand_in: bool = False
