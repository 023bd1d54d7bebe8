"""A rank's side of a change: `(state, event) -> (state, actions)`, without JAX, sockets or clocks.

    ALONE ──WarmedUp──▶ OFFERED ──Prepare──▶ PREPARING ──Prepared──▶ READY ──Commit──▶ SERVING
                          ▲ Load                 ▲                     │                  │
                          └──Loaded              ├──────Prepare────────┤     StepAccused  │
                                                 ├──────Prepare────── HOLDING ◀───────────┤
                                                 └──────Prepare───────────────────────────┘
A serving rank may receive a Fetch of experts beside its steps. A drained rank goes from any mode to
STANDBY, which is equivalent to OFFERED. An expert that no source supplies is listed in the Status
as `lost` and ends nothing: the supervisor decides what follows. Fenced, or a peer that cannot be
mapped, ends the process in any mode. A rank outside of the epoch goes back from PREPARING or READY
to OFFERED on a Load of other experts: its change was abandoned.
"""

import dataclasses

from eep_jax.coordination.protocol import (
    OUTSIDE,
    Commit,
    Fenced,
    Fetch,
    Load,
    Mode,
    Prepare,
    StandBy,
    Status,
)
from eep_jax.membership.view import View
from eep_jax.placement.placement import EMPTY, Placement, holds


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParticipantState:
    """A rank's state of the agreement. `view` and `placement` are those of `epoch`.

    `contents` leaves out the slots that a Load, Fetch or Prepare may be writing: their contents
    are undefined until Loaded, Fetched or Prepared.
    """

    rank: int
    mode: Mode = Mode.ALONE
    epoch: int = 0
    view: View | None = None
    placement: Placement | None = None
    prepare: Prepare | None = None
    load: Load | None = None
    fetch: Fetch | None = None
    fetched: int = 0
    left: int = 0  # the epoch it was drained in; older messages are ignored
    contents: tuple[int, ...] = ()
    accused: tuple[int, ...] = ()
    lost: dict[int, str] = dataclasses.field(default_factory=dict)  # see Status
    failure: str = ""

    @property
    def prepared(self) -> int:
        return self.prepare.epoch if self.prepare else 0

    def status(self, *, incarnation: int, sequence: int, **beside) -> Status:
        """The Status of this state; `beside` are its other fields, or the bank's contents."""
        shared = ("rank", "mode", "epoch", "prepared", "fetched", "contents", "accused", "lost")
        known = {name: getattr(self, name) for name in (*shared, "failure")}
        return Status(incarnation=incarnation, sequence=sequence, **known | beside)


@dataclasses.dataclass(frozen=True)
class WarmedUp:
    """Event: the rank compiled and ran its steps alone."""


@dataclasses.dataclass(frozen=True)
class Loaded:
    """Event: a Load is done; `contents` are those of the bank now, `lost` the missing experts."""

    contents: tuple[int, ...]
    lost: dict[int, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Fetched:
    """Event: a Fetch is done; `contents` are those of the bank now."""

    number: int
    contents: tuple[int, ...]
    lost: dict[int, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Prepared:
    """Event: a Prepare is done; `contents` are those of the bank now."""

    epoch: int
    contents: tuple[int, ...]
    lost: dict[int, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Broken:
    """Event: the rank cannot do its task."""

    reason: str


@dataclasses.dataclass(frozen=True)
class StepAccused:
    """Event: a step of `epoch` was discarded; `accused` are the ranks that it timed out on."""

    epoch: int
    accused: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class FillBank:
    """Action: carry out `load` without disturbing other ranks, then report Loaded.

    FillBank and CarryOut write the same bank: one at a time, in the order of the actions.
    """

    load: Load


@dataclasses.dataclass(frozen=True)
class FillSlots:
    """Action: carry out `fetch` expert by expert, between steps, then report Fetched.

    It ends as soon as the state holds another Fetch, or none.
    """

    fetch: Fetch


@dataclasses.dataclass(frozen=True)
class CarryOut:
    """Action: stop stepping, map and move according to `prepare`, then report Prepared."""

    prepare: Prepare


@dataclasses.dataclass(frozen=True)
class Resume:
    """Action: build the tables of this epoch and step on."""

    epoch: int
    view: View
    placement: Placement


@dataclasses.dataclass(frozen=True)
class End:
    """Action: end the process."""

    reason: str


@dataclasses.dataclass(frozen=True)
class Report:
    """Action: send a Status now."""


def advance(state: ParticipantState, event) -> tuple[ParticipantState, tuple]:
    """Applies a message or local event. Late and repeated ones change nothing or cause a report."""
    change = dataclasses.replace
    if state.mode is Mode.FENCED:
        return state, ()
    match event:
        case Fenced(reason=reason):
            return change(state, mode=Mode.FENCED, failure=reason), (End(reason),)
        case Broken(reason=reason):
            return change(state, failure=reason), (Report(),)
        case WarmedUp() if state.mode is Mode.ALONE:
            return change(state, mode=Mode.OFFERED), (Report(),)
        case Load() if state.mode in OUTSIDE and state.epoch == 0:
            if state.load is not None and state.load.slots == event.slots:
                return state, ()  # under way; a report now would only repeat the request
            if holds(state.contents, event.slots):
                return state, (Report(),)
            # `prepare` stays: an abandoned change must not be resumed.
            contents = _unwritten(state.contents, event.moves)
            state = change(state, mode=Mode.OFFERED, load=event, contents=contents, fetch=None)
            return change(state, lost={}), (FillBank(event),)
        case Loaded(contents=contents, lost=lost) if state.mode is Mode.OFFERED:
            return change(state, contents=contents, lost=lost, load=None), (Report(),)
        case Fetch() if state.mode is Mode.SERVING and event.epoch == state.epoch:
            if state.fetch is not None and state.fetch.number >= event.number:
                return state, ()  # under way, and will be reported
            if state.fetched >= event.number:
                return state, (Report(),)
            contents = _unwritten(state.contents, event.moves)
            return change(state, fetch=event, contents=contents, lost={}), (FillSlots(event),)
        case Fetched(number=number, contents=contents, lost=lost):
            if state.fetch is None or state.fetch.number != number:
                return state, ()
            state = change(state, fetch=None, fetched=number, contents=contents, lost=lost)
            return state, (Report(),)
        case Prepare() if state.mode is not Mode.ALONE:
            if event.epoch <= max(state.epoch, state.prepared, state.left):
                return state, (Report(),)
            contents = _unwritten(state.contents, event.moves)
            state = change(state, mode=Mode.PREPARING, prepare=event, load=None, fetch=None)
            return change(state, contents=contents, lost={}), (CarryOut(event),)
        case StandBy(epoch=epoch) if state.mode is not Mode.ALONE:
            if epoch < max(state.epoch, state.prepared) or epoch <= state.left:
                return state, ()
            state = change(state, mode=Mode.STANDBY, epoch=0, left=epoch, view=None, placement=None)
            state = change(state, prepare=None, load=None, fetch=None, accused=(), lost={})
            return state, (Report(),)
        case Prepared(epoch=epoch, contents=contents, lost=lost):
            if state.mode is not Mode.PREPARING or epoch != state.prepared:
                return state, ()  # a newer Prepare or Load is writing, and will report
            return change(state, mode=Mode.READY, contents=contents, lost=lost), (Report(),)
        case Commit(epoch=epoch):
            if state.mode is not Mode.READY or epoch != state.prepared:
                return state, ()
            return _serve(state)
        case StepAccused(epoch=epoch, accused=accused):
            if state.mode is not Mode.SERVING or epoch != state.epoch:
                return state, ()
            return change(state, mode=Mode.HOLDING, accused=accused, fetch=None), (Report(),)
    return state, ()


def _unwritten(contents: tuple[int, ...], moves) -> tuple[int, ...]:
    """The contents without the slots that these moves write."""
    written = {move.slot for move in moves}
    return tuple(EMPTY if slot in written else e for slot, e in enumerate(contents))


def _serve(state: ParticipantState) -> tuple[ParticipantState, tuple]:
    prepare = state.prepare
    serving = dataclasses.replace(
        state,
        mode=Mode.SERVING,
        epoch=prepare.epoch,
        view=prepare.view,
        placement=prepare.placement,
        prepare=None,
        accused=(),
        lost={},
    )
    return serving, (Resume(prepare.epoch, prepare.view, prepare.placement), Report())
