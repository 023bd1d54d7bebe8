"""The main loop of a rank: receive, decide, carry out, step.

The thread of the control client only moves bytes and sets the abort word; every decision and every
change of engine, heap and bank is made here, between two steps.
"""

import logging
import time

from eep_jax.coordination import participant as p
from eep_jax.coordination.protocol import Mode, Prepare, Status
from eep_jax.engine.protocol import RankEngine
from eep_jax.engine.request import Progress
from eep_jax.errors import HeapError, QueueFull, RelocationFailed
from eep_jax.placement.sources import Backup
from eep_jax.relocation.background_fetch import BackgroundFetch
from eep_jax.relocation.backup_store import BackupStore
from eep_jax.relocation.executor import Executor
from eep_jax.runtime.control import messages
from eep_jax.runtime.control.last_words import last_words
from eep_jax.runtime.control.rank_client import REASON_CHARACTERS_MAX, Connected, ControlClient
from eep_jax.runtime.rank.change_timer import ChangeTimer
from eep_jax.runtime.rank.priority import restore_priority
from eep_jax.runtime.rank.start_timer import StartTimer
from eep_jax.tables import build_tables

_log = logging.getLogger(__name__)

EXIT_OK, EXIT_FENCED = 0, 75
SLEEP_MS = 50
ATTACH_TRIES_MS = 6_000  # a peer that does not answer is usually dead, and soon out of the plan
TELEMETRY_MS = 500
HOLD_TRIES_MS = 1_000  # for all ranks to stop at one round; then a planned change aborts the step


class Agent:
    """One rank at work. `run` returns the exit status of the process."""

    def __init__(
        self,
        engine: RankEngine,
        executor: Executor,
        link: ControlClient,
        backups: BackupStore | None = None,
        start: StartTimer | None = None,
    ):
        self._rank, self._heap, self._engine = engine.rank, engine.heap, engine
        self._bank, self._lockstep = engine.bank, engine.lockstep
        self._executor, self._link, self._backups = executor, link, backups
        self._published: Status | None = None
        self._state = p.ParticipantState(rank=engine.rank, contents=engine.bank.contents)
        self._attached: dict[int, str] = {}
        self._finished: dict[str, Progress] = {}
        self._exit: int | None = None
        self._is_clear = False  # the flags of the own window
        self._telemetry_ms = 0
        self._planned: Prepare | None = None  # waits until all ranks hold
        self._planned_s = 0.0
        self._fetch_from_s = 0.0
        self._cluster = engine.config.cluster
        self._background = BackgroundFetch(executor, engine.lockstep.nudge)
        self._watch, self._start = ChangeTimer(executor), start or StartTimer()
        link.on_arrival = engine.lockstep.nudge
        link.on_prepare = engine.lockstep.abort

    def run(self) -> int:
        """Warms up alone, offers this rank, and serves until it has to end."""
        started = time.monotonic()
        self._watch.start = self._start.done(self._engine.warm_up())
        self._lockstep.clear_flags()
        self._is_clear = True  # until the first epoch: no rank sends to one outside it
        _log.info("warm after %.1f s", time.monotonic() - started)
        _log.info("start: %s", self._watch.start)
        restore_priority()  # from now on others may wait for this process
        self._link.beat()
        self._feed(p.WarmedUp())
        while self._exit is None:
            doorbell = self._lockstep.doorbell()
            for message in self._link.receive():
                self._handle(message)
            self._link.beat()
            self._send_telemetry()
            self._begin_planned()
            if self._exit is None and not (self._fetch() | self._step()):
                self._lockstep.sleep(doorbell, SLEEP_MS)
        self._lockstep.abort(self._engine.epoch + 1)
        self._engine.quiesce()
        return self._exit

    def stop(self) -> None:
        """Has `run` return after the step that it is in. Thread-safe."""
        self._exit = EXIT_OK if self._exit is None else self._exit
        self._lockstep.nudge()

    def _step(self) -> bool:
        """Runs one step if this rank may and any rank has work; False if there was none."""
        engine = self._engine
        if self._state.mode is not Mode.SERVING or engine.held:
            return False
        if engine.paused and not engine.try_wake():
            return False
        outcome = engine.advance()
        if outcome.committed and self._watch.stepped():
            self._send_numbers()  # the duration of the change is known
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
                self._engine.cancel(request_id)
                self._finished.pop(request_id, None)
            case messages.Shutdown():
                self.stop()
            case Connected():
                held = (*self._finished.values(), *self._engine.snapshot())
                self._link.send(messages.Held(progress=held))
                self._publish()
            case Prepare(planned=True) if self._state.mode is Mode.SERVING:
                self._plan(message)
            case _:
                self._feed(message)

    def _plan(self, prepare: Prepare) -> None:
        """Starts a change without a death: all ranks first stop at a round that they agree on."""
        if prepare.epoch <= self._state.epoch:
            self._feed(prepare)  # late; it is answered without effect
            return
        if self._planned is None:
            self._planned_s = time.monotonic()
        is_new = self._planned is None or self._planned.epoch < prepare.epoch
        self._planned = prepare
        self._engine.vote_hold()
        if is_new:
            self._attach_early(prepare)

    def _attach_early(self, prepare: Prepare) -> None:
        """Maps ranks that come in while steps go on, to shorten the stop; no step uses them yet."""
        for peer in prepare.view.in_epoch:
            if peer != self._rank and peer not in self._attached:
                try:
                    self._attach(peer, prepare.handles.get(peer, ""))
                except HeapError as error:  # tried again once all hold
                    _log.warning("cannot map rank %d yet: %s", peer, error)

    def _begin_planned(self) -> None:
        """Takes part in a planned change once all ranks hold, or cannot."""
        prepare, engine = self._planned, self._engine
        if prepare is None:
            return
        waited_ms = (time.monotonic() - self._planned_s) * 1e3
        if self._state.mode is Mode.SERVING and not engine.held:
            if waited_ms < HOLD_TRIES_MS:
                return
            _log.warning("ranks do not hold for epoch %d; the step is aborted", prepare.epoch)
            self._lockstep.abort(prepare.epoch)
        self._planned = None
        self._feed(prepare)

    def _fetch(self) -> bool:
        """Continues a Fetch between two steps; True if it did something that steps wait for."""
        fetch, bank = self._state.fetch, self._bank
        if fetch is None or time.monotonic() < self._fetch_from_s:
            return False
        missing = [m for m in fetch.moves if bank.contents[m.slot] != m.expert]
        came = self._background.advance(missing[0]) if missing else False
        if came is None:
            return False  # under way
        if came:
            if limit := self._cluster.background_bytes_per_s:
                self._fetch_from_s = time.monotonic() + bank.expert_bytes / limit
            return True
        lost = {missing[0].expert: self._background.failure} if missing else {}
        self._feed(p.Fetched(fetch.number, bank.contents, _in_short(lost)))
        return True

    def _accept(self, request) -> None:
        if request.id in self._finished:
            self._link.send(messages.Produced(progress=(self._finished[request.id],)))
            return
        try:
            self._engine.add(request)
        except (QueueFull, ValueError) as error:
            # The supervisor checks both before it assigns, so this is a bug there: log and go on.
            _log.error("request refused: %s", error)

    def _report(self, progress: tuple[Progress, ...]) -> None:
        for part in progress:
            if part.finish:
                self._finished[part.id] = part
        self._link.send(messages.Produced(progress=progress))

    def _feed(self, event) -> None:
        """Advances the participant and carries out its actions, whose results are fed in turn."""
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
                    if self._watch.is_waiting:
                        self._send_numbers()  # of the change before, which ends here
                    self._feed(self._carry_out(prepare))
                case p.Resume(view=view, placement=placement):
                    with self._watch.committing(view.epoch):
                        self._engine.resume(build_tables(view, placement, self._rank))
                    if self._backups is not None:
                        self._backups.follow(view.in_epoch, placement)
                case p.End(reason=reason):
                    _log.warning("%s", last_words(reason))
                    self._exit = EXIT_FENCED

    def _fill_bank(self, load):
        self._engine.quiesce()
        for peer, handle in load.handles.items():
            try:
                self._attach(peer, handle)
            except HeapError as error:
                # Not fatal: the content of a dummy fails its digest, and the next source is tried.
                _log.warning("cannot read from rank %d: %s", peer, error)
        with self._watch.loading():
            loaded = self._relocate(load.slots, load.moves, p.Loaded)
        self._executor.measure_memory(list(self._attached))
        return loaded

    def _carry_out(self, prepare):
        started, members = time.monotonic(), prepare.view.in_epoch
        self._engine.quiesce()
        for peer in list(self._attached):
            if peer not in members:
                self._heap.detach(peer)
                del self._attached[peer]
        for peer in members:
            if peer == self._rank:
                continue
            try:
                if not self._attach_patiently(peer, prepare.handles.get(peer, ""), prepare.epoch):
                    return p.Prepared(0, self._bank.contents)
            except HeapError as error:
                return p.Broken(f"cannot map rank {peer}: {error}")
        slots = prepare.placement.slots[self._rank]
        self._watch.detached(time.monotonic() - started)
        with self._watch.fetching():
            done = lambda contents, lost: p.Prepared(prepare.epoch, contents, lost)
            result = self._relocate(slots, prepare.moves, done)
        if prepare.epoch == 1:  # no rank has served yet
            self._executor.measure_memory(list(self._attached))
        # No step runs here, and none of the new epoch can run anywhere before the Commit.
        if not self._is_clear:
            self._lockstep.clear_flags()
        self._is_clear = False
        milliseconds = (time.monotonic() - started) * 1e3
        _log.info("prepared epoch %d in %.1f ms: %s", prepare.epoch, milliseconds, prepare.reason)
        return result

    def _relocate(self, slots, moves, done):
        """Fills slots. A failure is reported with its reason, and the rank goes on."""
        try:
            return done(self._executor.carry_out(slots, moves), {})
        except RelocationFailed as error:
            return done(self._bank.contents, _in_short(error.lost))

    def _attach(self, peer: int, handle: str) -> None:
        if handle and self._attached.get(peer) != handle:
            self._heap.attach(peer, handle)
            self._attached[peer] = handle

    def _attach_patiently(self, peer: int, handle: str, epoch: int) -> bool:
        """Maps a peer, with retries; False once a later epoch is being prepared."""
        deadline = time.monotonic() + ATTACH_TRIES_MS / 1000
        while self._lockstep.aborted_epoch <= epoch:
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
        self._published = self._status()
        self._link.publish(self._published)

    def _status(self) -> Status:
        backups = self._backups
        return self._state.status(
            incarnation=self._link.incarnation,
            sequence=0,  # numbered when it is sent
            contents=self._bank.contents,
            handle=self._heap.export(),
            backup=Backup() if backups is None else backups.offer,
            rates=self._executor.rates.medians(),
        )

    def _send_telemetry(self) -> None:
        now_ms = time.monotonic_ns() // 1_000_000
        if now_ms - self._telemetry_ms < TELEMETRY_MS:
            return
        if self._status() != self._published:
            self._publish()  # a backup was added, or a source measured
        self._send_numbers()

    def _send_numbers(self) -> None:
        self._telemetry_ms = time.monotonic_ns() // 1_000_000
        engine = self._engine
        self._link.send(
            messages.Telemetry(
                compilations=engine.compilations_since_start,
                steps=engine.steps,
                discarded=engine.discarded,
                moved=dict(self._executor.moved),
                bytes_moved=dict(self._executor.bytes_moved),
                change=self._watch.times,
                cache=engine.cache_use(),
                chosen=engine.take_chosen(),
            )
        )


def _in_short(lost: dict[int, str]) -> dict[int, str]:
    """Reasons, cut to the length that a Status may have."""
    return {expert: why[:REASON_CHARACTERS_MAX] for expert, why in lost.items()}
