"""Layout of a rank's window: the only module that adds byte offsets.

A window is the part of a rank's slab that peers write. Every region that a peer writes is indexed
by the writer's rank, so an evicted rank that still lives reaches only regions of its own number,
which are not read while that rank is inactive. Data regions exist twice, by round parity.

    abort       uint32 [1]            highest epoch in preparation; steps of lower ones end waits
    doorbell    uint32 [1]            changes whenever there may be something new; sleepers watch it
    wake        uint32 [R]            the round at which writer s found work while all were paused
    ticket      uint32 [3]            of the rank's own kernels: blocks of dispatch and of combine
                                      that are done, and the round whose results have come home
    sent        uint32 [2 R]          flags of dispatch: the round that writer s has sent whole
    returned    uint32 [2 R]          flags of combine
    votes       int32  [2 R 1]        the writer's vote for the next step
    slots       int32  [2 R T K]      slot on this rank of each choice, -1 if it runs elsewhere
    weights     f32    [2 R T K]
    rows        row    [2 R T D]      token t of source s; in fp8 its bytes and then its scales
    returns     row    [2 R T K D]    per_choice: result of choice k of my token t, by its rank
             or row    [2 R T D]      per_rank: that rank's weighted sum for my token t
"""

import dataclasses
import functools
import math

import ml_dtypes  # noqa: F401 (numpy learns the name bfloat16 from it)
import numpy as np

from pallas_kernels.sizes import SCALE_CHANNELS

REGION_ALIGNMENT_BYTES = 128
# Regions whose first axis is the parity of the round.
DOUBLE_BUFFERED = ("sent", "returned", "votes", "slots", "weights", "rows", "returns")


@dataclasses.dataclass(frozen=True)
class Region:
    """A named array at a byte offset of a slab."""

    name: str
    offset: int
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class WindowLayout:
    """Offsets of one rank's window for R ranks, T tokens, K choices and D channels.

    Raises ValueError for sizes below one or an unknown combine mode.
    """

    ranks: int
    tokens: int
    choices: int
    hidden: int
    combine: str = "per_choice"
    row_dtype: str = "float32"
    dispatch_dtype: str = ""  # "float8_e4m3fn": rows travel as fp8 with a scale per SCALE_CHANNELS

    def __post_init__(self) -> None:
        for name in ("ranks", "tokens", "choices", "hidden"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.combine not in ("per_choice", "per_rank"):
            raise ValueError(f"combine={self.combine!r} must be 'per_choice' or 'per_rank'")
        if self.dispatch_dtype not in ("", "float8_e4m3fn"):
            raise ValueError(
                f"dispatch_dtype={self.dispatch_dtype!r} must be '' or 'float8_e4m3fn'"
            )
        if self.dispatch_dtype and self.hidden % SCALE_CHANNELS:
            raise ValueError(
                f"hidden={self.hidden} must be a multiple of {SCALE_CHANNELS} for fp8 rows, which "
                "have one scale per that many channels; use dispatch_dtype=''"
            )

    @property
    def row_bytes(self) -> int:
        """Bytes of one row as dispatch sends it."""
        if self.dispatch_dtype:
            return round_up(self.hidden + 4 * (self.hidden // SCALE_CHANNELS), 16)
        return self.hidden * np.dtype(self.row_dtype).itemsize

    @property
    def _rows(self) -> tuple[str, int]:
        """Dtype and length of a row in the window."""
        return ("uint8", self.row_bytes) if self.dispatch_dtype else (self.row_dtype, self.hidden)

    @functools.cached_property
    def regions(self) -> dict[str, Region]:
        ranks, tokens, choices, hidden = self.ranks, self.tokens, self.choices, self.hidden
        results = (tokens, choices, hidden) if self.combine == "per_choice" else (tokens, hidden)
        wanted = [
            ("abort", "uint32", (1,)),
            ("doorbell", "uint32", (1,)),
            ("wake", "uint32", (ranks,)),
            ("ticket", "uint32", (3,)),
            ("sent", "uint32", (2, ranks)),
            ("returned", "uint32", (2, ranks)),
            ("votes", "int32", (2, ranks, 1)),
            ("slots", "int32", (2, ranks, tokens, choices)),
            ("weights", "float32", (2, ranks, tokens, choices)),
            ("rows", self._rows[0], (2, ranks, tokens, self._rows[1])),
            ("returns", self.row_dtype, (2, ranks, *results)),
        ]
        found, offset = {}, 0
        for name, dtype, shape in wanted:
            region = Region(name, offset, np.dtype(dtype), shape)
            found[name] = region
            offset = round_up(offset + region.bytes, REGION_ALIGNMENT_BYTES)
        return found

    @property
    def flags(self) -> Region:
        """All words that count rounds, as bytes: from `ticket` to the end of `returned`."""
        first, last = self.regions["ticket"], self.regions["returned"]
        nbytes = last.offset + last.bytes - first.offset
        return Region("flags", first.offset, np.dtype("uint8"), (nbytes,))

    @property
    def window_bytes(self) -> int:
        last = self.regions["returns"]
        return round_up(last.offset + last.bytes, REGION_ALIGNMENT_BYTES)

    def views(self, heap: np.ndarray) -> list[dict[str, np.ndarray]]:
        """For each rank its regions as host arrays over `heap`, uint8 `[R slab_bytes]`."""
        return [
            {name: view(slab, region) for name, region in self.regions.items()} for slab in heap
        ]


def view(slab: np.ndarray, region: Region) -> np.ndarray:
    """The region of one slab (uint8 `[slab_bytes]`) as a writable host array."""
    piece = slab[region.offset : region.offset + region.bytes]
    return piece.view(region.dtype).reshape(region.shape)


def round_up(size: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is not below `size`: 130 by 128 is 256."""
    return -(-size // multiple) * multiple
