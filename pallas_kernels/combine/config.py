"""How combine is launched; chosen by shape."""

import dataclasses

from pallas_kernels.device import SM_COUNT

BLOCKS_PER_SM = 8


@dataclasses.dataclass(frozen=True)
class CombineConfig:
    """Blocks at most of the kernel that sends results home, and of the one that sums them.

    Of those that send not all are there at once; who has nothing to send is soon gone. A thread
    makes partial sums (`per_rank`) of `sum_chunks` x 8 channels at a time.
    """

    send_blocks: int = SM_COUNT * BLOCKS_PER_SM * 8
    sum_blocks: int = SM_COUNT * BLOCKS_PER_SM
    sum_chunks: int = 4
