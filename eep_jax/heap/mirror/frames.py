"""Frames of one round: packed from a staging window, stored into the peer's own.

A frame holds the data that a flag announces; it is stored before the flag is posted. A flag holds
its round, so a late or repeated frame satisfies no wait.

    header    kind u8, 3 unused, round u32, items u32, payload bytes u32; little endian
    SENT      the writer's vote, slots [T K], weights [T K], item numbers [N], rows [N]
    RETURNED  item numbers [N], results [N]; an item is a token, or a choice of one (per_choice)
    WAKE      empty: the round at which the writer found work
"""

import enum
import struct

import numpy as np

from pallas_kernels.exchange.signals import parity, post
from pallas_kernels.window import WindowLayout

HEADER = struct.Struct("<BxxxIII")
Window = dict[str, np.ndarray]  # regions of one slab by name
ROUTING = ("votes", "slots", "weights")  # of all tokens, before the rows
_NUMBER = np.dtype("<u4")


class Kind(enum.IntEnum):
    """Content of a frame; kinds of one round are numbered in the order of their creation."""

    SENT = 1
    RETURNED = 2
    WAKE = 3


class BadFrame(ValueError):
    """Malformed frame: no rank of this configuration sends it."""


class FrameCodec:
    """Packs and stores frames between windows of one layout, for the rank of this process."""

    def __init__(self, layout: WindowLayout, rank: int):
        self._layout, self._rank = layout, rank
        self._regions = layout.regions
        tokens, choices = layout.tokens, layout.choices
        self._results = tokens * choices if layout.combine == "per_choice" else tokens
        routing = sum(self._bytes_of_one(name) for name in ROUTING)
        self._fixed_bytes = {Kind.SENT: routing, Kind.RETURNED: 0, Kind.WAKE: 0}
        self._items_max = {Kind.SENT: tokens, Kind.RETURNED: self._results, Kind.WAKE: 0}
        result = self._regions["returns"]
        self._item_bytes = {
            Kind.SENT: layout.row_bytes,
            Kind.RETURNED: layout.hidden * result.dtype.itemsize,
            Kind.WAKE: 0,
        }

    @property
    def payload_bytes_max(self) -> int:
        """Payload length of the longest frame."""
        return max(self.payload_bytes(kind, self._items_max[kind]) for kind in Kind)

    def _bytes_of_one(self, name: str) -> int:
        """Bytes of one writer in a double-buffered region, for one parity."""
        return self._regions[name].bytes // (2 * self._layout.ranks)

    def flags(self, window: Window) -> list[tuple[Kind, np.ndarray]]:
        """Flags of this rank in a window, with the kind of frame that a change of each requires."""
        rank = self._rank
        doubled = ((Kind.SENT, "sent"), (Kind.RETURNED, "returned"))
        found = [
            (kind, window[name][half, rank : rank + 1]) for kind, name in doubled for half in (0, 1)
        ]
        return [*found, (Kind.WAKE, window["wake"][rank : rank + 1])]

    def payload_bytes(self, kind: int, items: int) -> int:
        """Payload length of a frame. Raises BadFrame for an unknown kind or too many items."""
        if kind not in self._items_max:
            raise BadFrame(f"unknown kind {kind}; expected one of {[k.value for k in Kind]}")
        if items > self._items_max[kind]:
            raise BadFrame(
                f"{items} items in a frame of kind {Kind(kind).name}, at most "
                f"{self._items_max[kind]} fit into a window"
            )
        return self._fixed_bytes[kind] + items * (_NUMBER.itemsize + self._item_bytes[kind])

    def pack(
        self, kind: Kind, number: int, staging: Window, own: Window, peer: int
    ) -> list[bytes | memoryview]:
        """Copies the frame of round `number` for `peer`: header, then buffers of the payload.

        `staging` is the window that this rank's kernels filled in place of the peer's, `own` the
        own window, whose slots of the peer's tokens determine which results it gets.
        """
        pieces = []
        half, rank = parity(number), self._rank
        if kind is Kind.SENT:
            slots = staging["slots"][half, rank]
            items = np.flatnonzero((slots >= 0).any(axis=1)).astype(_NUMBER)
            rows = staging["rows"][half, rank][items]
            routing = (staging[name][half, rank].tobytes() for name in ROUTING)
            pieces = [*routing, items.tobytes(), _bytes_of(rows)]
        elif kind is Kind.RETURNED:
            wanted = own["slots"][half, peer] >= 0
            if self._layout.combine != "per_choice":
                wanted = wanted.any(axis=1)
            items = np.flatnonzero(wanted.reshape(-1)).astype(_NUMBER)
            results = staging["returns"][half, rank].reshape(self._results, -1)[items]
            pieces = [items.tobytes(), _bytes_of(results)]
        count = len(items) if pieces else 0
        length = sum(map(len, pieces))
        return [HEADER.pack(kind, number, count, length), *pieces]

    def store(
        self, kind: int, number: int, items: int, payload: memoryview, own: Window, writer: int
    ) -> None:
        """Stores a frame of `writer` in its regions of the own window, then posts its flag.

        Raises BadFrame, before anything is stored.
        """
        if len(payload) != self.payload_bytes(kind, items):
            raise BadFrame(
                f"{len(payload)} bytes for {items} items of kind {Kind(kind).name}, expected "
                f"{self.payload_bytes(kind, items)}"
            )
        half = parity(number)
        if kind == Kind.WAKE:
            post(own["wake"][writer : writer + 1], number)
            doorbell = own["doorbell"]
            post(doorbell, (int(doorbell[0]) + 1) & 0xFFFFFFFF)
            return
        fixed = self._fixed_bytes[kind]
        numbers_end = fixed + items * _NUMBER.itemsize
        numbers = np.frombuffer(payload[fixed:numbers_end], _NUMBER)
        if items and int(numbers.max()) >= self._items_max[kind]:
            raise BadFrame(f"item {int(numbers.max())} is not below {self._items_max[kind]}")
        data = np.frombuffer(payload[numbers_end:], np.uint8).reshape(items, -1 if items else 0)
        if kind == Kind.SENT:
            self._store_routing(payload[:fixed], {n: own[n][half, writer] for n in ROUTING})
            target, flag = own["rows"][half, writer], own["sent"]
        else:
            target = own["returns"][half, writer].reshape(self._results, -1)
            flag = own["returned"]
        if items:
            target.view(np.uint8)[numbers] = data
        # Invariant: the whole frame is stored before a wait for it can end.
        post(flag[half, writer : writer + 1], number)

    def _store_routing(self, routing: memoryview, targets: Window) -> None:
        found, start = {}, 0
        for name, target in targets.items():
            piece = routing[start : start + target.nbytes]
            found[name] = np.frombuffer(piece, target.dtype).reshape(target.shape)
            start += target.nbytes
        if int(found["slots"].min()) < -1:
            raise BadFrame(f"slot {int(found['slots'].min())} is below -1")
        for name, target in targets.items():
            target[...] = found[name]


def _bytes_of(array: np.ndarray) -> memoryview:
    """The bytes of an array."""
    return memoryview(np.ascontiguousarray(array).view(np.uint8).reshape(-1))
