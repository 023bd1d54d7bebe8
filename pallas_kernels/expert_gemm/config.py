"""Launch configuration of the expert GEMM on a GPU, chosen by shape."""

import dataclasses
import math

from pallas_kernels.device import SM_COUNT
from pallas_kernels.sizes import WIDTH_MULTIPLE

GROUP_ROWS = 64  # rows of one warpgroup's matrix instruction
STAGES_MIN = 4  # two are being gathered, one is handed over, one is multiplied


@dataclasses.dataclass(frozen=True)
class GemmConfig:
    """Launch configuration.

    Args:
        tile_rows: rows of a tile, 64 for each multiplying warpgroup; one more warpgroup loads.
        tile_columns: columns of a tile of gate and up.
        stages: buffers of operands of gate and up.
        down_columns: columns of a tile of down.
        down_stages: buffers of operands of down.
        blocks: of each kernel.
    """

    tile_rows: int = 64
    tile_columns: int = 128
    stages: int = 5
    down_columns: int = 128
    down_stages: int = 6
    blocks: int = SM_COUNT

    def __post_init__(self) -> None:
        if self.tile_rows not in (GROUP_ROWS, 2 * GROUP_ROWS):
            raise ValueError(f"{self.tile_rows=} must be {GROUP_ROWS} or {2 * GROUP_ROWS}")
        if self.stages < STAGES_MIN or self.down_stages < 2:
            raise ValueError(
                f"{self.stages=} must be at least {STAGES_MIN} and {self.down_stages=} at least 2: "
                "with fewer, loading and multiplying wait for each other"
            )

    @property
    def groups(self) -> int:
        return self.tile_rows // GROUP_ROWS


def config_for(
    tile_rows: int, slots: int, expert_hidden: int, hidden: int, rows_per_slot: float = math.inf
) -> GemmConfig:
    """The configuration for S experts of F channels over rows of D, of which a slot gets so many.

    Raises NotImplementedError unless F and D are multiples of WIDTH_MULTIPLE.
    """
    if expert_hidden % WIDTH_MULTIPLE or hidden % WIDTH_MULTIPLE:
        raise NotImplementedError(
            f"experts of F={expert_hidden} over D={hidden} channels: the GPU kernels need "
            f"multiples of {WIDTH_MULTIPLE}; pad the experts with zeros"
        )
    columns = [c for c in (128, 64) if expert_hidden % c == 0]
    down_columns = [c for c in (128, 64) if hidden % c == 0]
    if tile_rows > GROUP_ROWS:
        wide = 256 if hidden % 256 == 0 else down_columns[0]
        narrow = rows_per_slot <= tile_rows  # then the time is that of the weights' bytes
        return GemmConfig(
            tile_rows=tile_rows,
            tile_columns=64 if narrow else columns[0],
            stages=5 if narrow else 4,
            down_columns=wide,
            down_stages=3 if wide == 256 else 5,
        )
    # Few rows: the time is that of the weights' bytes, evenly shared by the multiprocessors.
    idle = {c: _idle_share(slots * expert_hidden // c) for c in columns}
    best = min(columns, key=lambda c: (round(idle[c], 1), -c))
    return GemmConfig(tile_columns=best, stages=5 if best > 64 else 8, down_columns=down_columns[0])


def _idle_share(units: int) -> float:
    """Share of the multiprocessors' time that is idle, over all rounds of `units`."""
    rounds = -(-units // SM_COUNT)
    return 1 - units / (rounds * SM_COUNT)
