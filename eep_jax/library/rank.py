"""One rank of an elastic run inside the user's own process: join, call the step, end.

The agent of the serving runtime runs in a thread of its own, with the user's step for its engine.
It heartbeats, repairs and admits while the user's thread does something else.
"""

import logging
import pathlib
import threading
import time

import jax

from eep_jax.errors import EepError
from eep_jax.library.given_experts import open_experts
from eep_jax.library.operator import AdminClient
from eep_jax.library.stepper import StepEngine
from eep_jax.library.supervise import read_run
from eep_jax.runtime.control.endpoint import ENDPOINT
from eep_jax.runtime.control.rank_client import ControlClient, client_of
from eep_jax.runtime.rank.agent import EXIT_FENCED, Agent
from eep_jax.runtime.rank.assemble import assemble_agent, layout_of, open_slab

_log = logging.getLogger(__name__)

JOIN_TIMEOUT_S = 120.0
RUN_TIMEOUT_S = 120.0
LEAVE_TIMEOUT_S = 10.0
DRAIN_TIMEOUT_S = 30.0
ASK_BACK_S = 0.5  # how often a rank that waits to be a member asks whether it was drained


class RankEnded(EepError):
    """This rank takes part no longer: it left, was evicted, or its supervisor ended the run."""


class ElasticRank:
    """A member of a run; made by `join`. `run` may be called from any thread."""

    def __init__(
        self, agent: Agent, stepper: StepEngine, link: ControlClient, operator: AdminClient
    ):
        self._agent, self._stepper, self._link = agent, stepper, link
        self._operator = operator
        self._thread = threading.Thread(target=self._work, name="agent", daemon=True)
        self._thread.start()

    def run(self, *arguments, timeout_s: float = RUN_TIMEOUT_S):
        """`step(place, *arguments)`'s result, once a step of it was committed.

        Arguments have the shapes and dtypes of the example. Ranks need not call equally often: one
        that does not call computes for the others all the same. This waits while the cluster is
        being repaired, or has too few slots for all experts.

        Raises ValueError for other shapes, RankEnded where this rank is no member any more,
        TimeoutError after `timeout_s`; the call may still run then, its result is lost.
        """
        pending = self._stepper.submit(arguments)
        try:
            return pending.result(timeout_s)
        except TimeoutError:
            raise TimeoutError(
                f"no step was committed within {timeout_s} s at epoch {self.epoch} with ranks "
                f"{self.active}; the supervisor's status says what the cluster waits for"
            ) from None

    @property
    def epoch(self) -> int:
        """The epoch of the last change of membership that this rank knows."""
        return self._stepper.epoch

    @property
    def active(self) -> tuple[int, ...]:
        """The ranks of that epoch."""
        return self._stepper.active

    @property
    def compilations(self) -> int:
        """Compilations of steps since the rank joined; stays 0."""
        return self._stepper.compilations_since_start

    @property
    def discarded(self) -> int:
        """Steps that were run again because a peer was suspected or an epoch prepared."""
        return self._stepper.discarded

    @property
    def dropped(self) -> int:
        """Choices without a live expert in committed calls; 0 unless the policy is `degrade`."""
        return self._stepper.dropped

    def leave(self, *, drain_timeout_s: float = DRAIN_TIMEOUT_S) -> bool:
        """Ends this rank's part between two steps. End the process soon; `join` comes back.

        First the run is asked to let the rank go (a drain): experts that only it has are brought to
        others, and no step of anybody is discarded. Returns whether that was done. Where it cannot
        be, since the others have too few slots or do not answer within `drain_timeout_s`, the rank
        leaves all the same, which to the others is as if the process had died: one repair. 0 does
        not ask. A process that goes on is killed after `fenced_grace_ms`, since nobody may write to
        memory of a run that it left.
        """
        drained = drain_timeout_s > 0 and self._operator.drain(drain_timeout_s)
        self._agent.stop()
        self._thread.join(LEAVE_TIMEOUT_S)
        self._link.stop()
        return drained

    def _work(self) -> None:
        error: Exception = RankEnded("this rank left, or the supervisor ended the run")
        try:
            if self._agent.run() == EXIT_FENCED:
                error = RankEnded("this rank was evicted; start a new process to return")
        except Exception as broken:
            _log.exception("the rank cannot go on")
            error = broken
        self._stepper.close(error)
        self._link.stop()

    def _wait_until_member(self, timeout_s: float) -> None:
        ends_s = time.monotonic() + timeout_s
        while not self._stepper.resumed.wait(min(ASK_BACK_S, max(0.0, ends_s - time.monotonic()))):
            if time.monotonic() < ends_s:
                self._operator.come_back()
                continue
            raise TimeoutError(
                f"the run did not begin within {timeout_s} s: the first epoch waits for all ranks "
                "of the configuration, a return for the survivors; see supervisor.log in its "
                "run directory"
            )
        self._stepper.raise_if_closed()


def join(
    run_dir, rank: int, step, example: tuple, experts, *, timeout_s: float = JOIN_TIMEOUT_S
) -> ElasticRank:
    """Joins the run of `run_dir` as `rank`, for the first time or again, and waits to be a member.

    A rank that left, or was drained by `scale_down`, is thereby wanted again.

    `step(place, *arguments) -> (result, place)` is compiled once, for the shapes of `example`, and
    may be jitted or not; all ranks give their expert layers the same number of rows, in the same
    order. `experts` are `expert_arrays(model)`, or a checkpoint directory: what no peer holds any
    more is read from there. JAX must compute on the run's platform already.

    Raises ValueError for a directory or rank that is none, CheckpointError for experts of other
    sizes, what tracing `step` raises, RankEnded and TimeoutError.
    """
    config, token = read_run(run_dir)
    if not 0 <= rank < config.cluster.ranks:
        raise ValueError(f"{rank=} must be in 0..{config.cluster.ranks - 1}")
    if jax.default_backend() != config.platform:
        raise ValueError(
            f"the run is for platform {config.platform!r}, JAX computes on "
            f"{jax.default_backend()!r}; set JAX_PLATFORMS, or run_config(platform=)"
        )
    layout, root = layout_of(config), pathlib.Path(run_dir)
    source = open_experts(experts, config.model, layout.bank.dtype)
    heap = open_slab(config, rank, layout)
    stepper = StepEngine(config, rank, heap, layout, step, example)
    link = client_of(config, rank, root, token)
    agent = assemble_agent(stepper, source, link)
    link.start()
    member = ElasticRank(agent, stepper, link, AdminClient(root / ENDPOINT, rank))
    member._wait_until_member(timeout_s)
    return member
