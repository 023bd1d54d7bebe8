"""The main loop of a rank: receive, decide, carry out, step.

The link's thread only moves bytes and sets the abort word; every decision and every change of
engine, heap and bank is made here, between two steps.
"""

import logging
import time

from eep_jax.coordination import participant as p
from eep_jax.coordination.protocol import Mode, Status
from eep_jax.engine.engine import Engine
from eep_jax.engine.request import Progress
from eep_jax.errors import HeapError, QueueFull, RelocationFailed
from eep_jax.heap.heap import SymmetricHeap
from eep_jax.relocation.executor import Executor
from eep_jax.runtime import messages
from eep_jax.runtime.link import Connected, Link
from eep_jax.tables import build_tables

_log = logging.getLogger(__name__)

EXIT_OK, EXIT_FENCED = 0, 75
SLEEP_MS = 50
ATTACH_TRIES_MS = 6_000  # a peer that does not answer is usually dead, and soon out of the plan
TELEMETRY_MS = 500


class Agent:
    """One rank at work. `run` returns the exit status of the process."""

    def __init__(
        self, rank: int, engine: Engine, heap: SymmetricHeap, executor: Executor, link: Link
    ):
        self._rank, self._engine, self._heap = rank, engine, heap
        self._executor, self._link = executor, link
        self._state = p.ParticipantState(rank=rank, contents=engine.bank.contents)
        self._attached: dict[int, str] = {}
        self._finished: dict[str, Progress] = {}
        self._exit: int | None = None
        self._telemetry_ms = 0
        link.on_arrival = engine.lockstep.nudge
        link.on_prepare = engine.lockstep.abort

    def run(self) -> int:
        """Warms up alone, offers itself, and serves until it is told to end."""
        started = time.monotonic()
        self._engine.warm_up()
        self._engine.lockstep.clear_flags()
        _log.info("warm after %.1f s", time.monotonic() - started)
        self._link.beat()
        self._feed(p.WarmedUp())
        while self._exit is None:
            bell = self._engine.lockstep.bell()
            for message in self._link.receive():
                self._handle(message)
            self._link.beat()
            self._send_telemetry()
            if self._exit is None and not self._step():
                self._engine.lockstep.sleep(bell, SLEEP_MS)
        return self._exit

    def _step(self) -> bool:
        """Runs one step if this rank may and anybody has work; False if there was nothing to do."""
        engine = self._engine
        if self._state.mode is not Mode.SERVING or (engine.paused and not engine.try_wake()):
            return False
        outcome = engine.advance()
        if not outcome.committed:
            self._feed(p.StepAccused(engine.epoch, outcome.accused))
        elif outcome.progress:
            self._report(outcome.progress)
        return True

    def _handle(self, message) -> None:
        match message:
            case messages.Generate(request=request):
                self._accept(request)
            case messages.Forget(id=request_id):
                self._engine.scheduler.cancel(request_id)
                self._finished.pop(request_id, None)
            case messages.Shutdown():
                self._exit = EXIT_OK
            case Connected():
                held = (*self._finished.values(), *self._engine.scheduler.snapshot())
                self._link.send(messages.Held(progress=held))
                self._publish()
            case _:
                self._feed(message)

    def _accept(self, request) -> None:
        if request.id in self._finished:
            self._link.send(messages.Produced(progress=(self._finished[request.id],)))
            return
        try:
            self._engine.add(request)
        except (QueueFull, ValueError) as error:
            # The supervisor checks both before it assigns, so this is its mistake: log and go on.
            _log.error("request refused: %s", error)

    def _report(self, progress: tuple[Progress, ...]) -> None:
        for part in progress:
            if part.finish:
                self._finished[part.id] = part
        self._link.send(messages.Produced(progress=progress))

    def _feed(self, event) -> None:
        """Advances the participant and carries out its actions; what they cause is fed in turn."""
        before = self._state
        self._state, actions = p.advance(self._state, event)
        if before.mode is not self._state.mode:
            _log.info(
                "%s -> %s on %s", before.mode.value, self._state.mode.value, type(event).__name__
            )
        for action in actions:
            match action:
                case p.Report():
                    self._publish()
                case p.FillBank(load=load):
                    self._publish()
                    self._feed(self._fill_bank(load))
                case p.CarryOut(prepare=prepare):
                    self._publish()
                    self._feed(self._carry_out(prepare))
                case p.Resume(view=view, placement=placement):
                    self._engine.resume(build_tables(view, placement, self._rank))
                case p.End(reason=reason):
                    _log.warning("ending: %s", reason)
                    self._exit = EXIT_FENCED

    def _fill_bank(self, load):
        for peer, handle in load.handles.items():
            try:
                self._attach(peer, handle)
            except HeapError as error:
                # Not fatal: what a dummy holds fails its digest, and the next source is tried.
                _log.warning("cannot read from rank %d: %s", peer, error)
        return self._relocate(load.slots, load.moves, p.Loaded)

    def _carry_out(self, prepare):
        started, members = time.monotonic(), prepare.view.in_epoch
        for peer in list(self._attached):
            if peer not in members:
                self._heap.detach(peer)
                del self._attached[peer]
        for peer in members:
            if peer == self._rank:
                continue
            try:
                if not self._attach_patiently(peer, prepare.handles.get(peer, ""), prepare.epoch):
                    return p.Prepared(0, self._engine.bank.contents)
            except HeapError as error:
                return p.Broken(f"cannot map rank {peer}: {error}")
        slots = prepare.placement.slots[self._rank]
        result = self._relocate(slots, prepare.moves, lambda c: p.Prepared(prepare.epoch, c))
        # No step runs here, and none of the new epoch can run anywhere before the Commit.
        self._engine.lockstep.clear_flags()
        milliseconds = (time.monotonic() - started) * 1e3
        _log.info("prepared epoch %d in %.1f ms: %s", prepare.epoch, milliseconds, prepare.reason)
        return result

    def _relocate(self, slots, moves, done):
        try:
            return done(self._executor.carry_out(slots, moves))
        except RelocationFailed as error:
            return p.Broken(str(error))

    def _attach(self, peer: int, handle: str) -> None:
        if handle and self._attached.get(peer) != handle:
            self._heap.attach(peer, handle)
            self._attached[peer] = handle

    def _attach_patiently(self, peer: int, handle: str, epoch: int) -> bool:
        """Maps a peer, trying again for a while; False once a later epoch is being prepared."""
        deadline = time.monotonic() + ATTACH_TRIES_MS / 1000
        while self._engine.lockstep.aborted_epoch <= epoch:
            try:
                self._attach(peer, handle)
                return True
            except HeapError:
                if time.monotonic() > deadline:
                    raise
            self._link.beat()
            time.sleep(0.05)
        return False

    def _publish(self) -> None:
        state = self._state
        self._link.publish(
            Status(
                rank=self._rank,
                incarnation=self._link.incarnation,
                sequence=0,  # numbered by the link as it is sent
                mode=state.mode,
                epoch=state.epoch,
                prepared=state.prepared,
                contents=self._engine.bank.contents,
                accused=state.accused,
                handle=self._heap.export(),
                failure=state.failure,
            )
        )

    def _send_telemetry(self) -> None:
        now_ms = time.monotonic_ns() // 1_000_000
        if now_ms - self._telemetry_ms < TELEMETRY_MS:
            return
        self._telemetry_ms = now_ms
        engine = self._engine
        self._link.send(
            messages.Telemetry(
                compilations=engine.compilations_since_start,
                steps=engine.steps,
                discarded=engine.discarded,
                moved=dict(self._executor.moved),
            )
        )
