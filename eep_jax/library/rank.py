"""One rank of an elastic run inside the user's own process: join, call the step, leave.

The agent of the serving runtime runs in a thread of its own, with the user's step for its engine.
It heartbeats, repairs and admits while the user's thread does something else.
"""

import logging
import os
import pathlib
import threading
import time
from collections.abc import Callable

import jax
import numpy as np
from jaxtyping import PyTree

from eep_jax.errors import RankEnded
from eep_jax.library.admin_client import AdminClient
from eep_jax.library.elastic_moe import ExpertRouting
from eep_jax.library.in_memory_experts import open_experts
from eep_jax.library.step_engine import StepEngine
from eep_jax.library.supervise import read_run
from eep_jax.runtime.control.rank_client import ControlClient, client_of
from eep_jax.runtime.rank.agent import EXIT_FENCED, Agent
from eep_jax.runtime.rank.assemble import assemble_agent, layout_of, open_slab

_log = logging.getLogger(__name__)

JOIN_TIMEOUT_S = 120.0
RUN_TIMEOUT_S = 120.0
LEAVE_TIMEOUT_S = 10.0
DRAIN_TIMEOUT_S = 30.0
ASK_BACK_S = 0.5  # interval at which a rank that waits to be a member asks whether it is drained


class ElasticRank:
    """A member of a run, made by `join`. Thread-safe.

    Example:
        >>> me.active, me.compilations, me.discarded, me.dropped  # `me` as in the example of `join`
        ((0,), 0, 0, 0)
        >>> me.run(x).shape
        (4, 8)
    """

    def __init__(self, agent: Agent, engine: StepEngine, link: ControlClient, admin: AdminClient):
        self._agent, self._engine, self._link, self._admin = agent, engine, link, admin
        self._thread = threading.Thread(target=self._work, name="agent", daemon=True)
        self._thread.start()

    def run(self, *arguments: PyTree, timeout_s: float = RUN_TIMEOUT_S) -> PyTree:
        """Runs the step, again until it is committed.

        Ranks need not call equally often: one that does not call computes for the others all the
        same. The call waits while the cluster is being repaired, or has too few slots.

        Args:
            *arguments: As the example given to `join`: same trees, shapes and dtypes.
            timeout_s: Time to wait for the result.

        Returns:
            The first value that the step returned.

        Raises:
            ValueError: The shapes are not those of the example, or too many calls wait.
            RankEnded: This rank is not a member any more.
            TimeoutError: No step was committed in time; the call may still run, its result is lost.
        """
        pending = self._engine.submit(arguments)
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
        return self._engine.epoch

    @property
    def active(self) -> tuple[int, ...]:
        """The ranks of that epoch."""
        return self._engine.active

    @property
    def compilations(self) -> int:
        """Compilations of steps since the rank joined; stays 0."""
        return self._engine.compilations_since_start

    @property
    def discarded(self) -> int:
        """Steps that ran again because a peer was suspected or an epoch was prepared."""
        return self._engine.discarded

    @property
    def dropped(self) -> int:
        """Choices without a live expert in committed calls; 0 unless the policy is `degrade`."""
        return self._engine.dropped

    def leave(self, *, drain_timeout_s: float = DRAIN_TIMEOUT_S) -> bool:
        """Leaves the run between two steps; `join` in a new process comes back.

        A drain comes first: experts that only this rank has are brought to others, and no rank
        discards a step. Where that is not possible, the rank leaves all the same, which costs the
        others one repair. End the process soon: it is killed after `fenced_grace_ms`, since no
        process may write to the memory of a run that it left.

        Args:
            drain_timeout_s: Time for the drain; 0 leaves without one.

        Returns:
            Whether the rank was drained: False where the others have too few slots, or the
            supervisor did not answer in time.
        """
        drained = drain_timeout_s > 0 and self._admin.drain(drain_timeout_s)
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
        self._engine.close(error)
        self._link.stop()

    def _wait_until_member(self, timeout_s: float) -> None:
        ends_s = time.monotonic() + timeout_s
        while not self._engine.resumed.wait(min(ASK_BACK_S, max(0.0, ends_s - time.monotonic()))):
            if time.monotonic() < ends_s:
                self._admin.come_back()
                continue
            raise TimeoutError(
                f"the run did not begin within {timeout_s} s: the first epoch waits for all ranks "
                "of the configuration, a return for the survivors; see supervisor.log in its "
                "run directory"
            )
        self._engine.raise_if_closed()


def join(
    run_dir: str | os.PathLike,
    rank: int,
    step: Callable[..., tuple[PyTree, ExpertRouting]],
    example: tuple[PyTree, ...],
    experts: dict[str, np.ndarray] | str | os.PathLike,
    *,
    timeout_s: float = JOIN_TIMEOUT_S,
) -> ElasticRank:
    """Joins a run as one of its ranks, for the first time or again, and waits to be a member.

    A rank that left, or was drained by `scale_down`, is wanted again from then on.

    Args:
        run_dir: Directory given to `start_supervisor`.
        rank: 0..R-1. One process at a time is a rank.
        step: `step(routing, *arguments) -> (result, routing)`, jitted or not. It is compiled once.
            All ranks give their expert layers equally many rows, in the same order.
        example: Arguments of the shapes and dtypes of all calls. A rank without a call runs the
            step with them, for the other ranks. No argument may be donated.
        experts: `expert_arrays(model)`, or a checkpoint directory: the source of experts that no
            peer has.
        timeout_s: Time to wait until the run begins or takes this rank back.

    Returns:
        The member, whose `run` calls the step.

    Raises:
        ValueError: `run_dir` is not a run directory, `rank` is out of range, or JAX computes on
            another platform than the run.
        CheckpointError: The experts have other sizes than the run.
        HeapError: The memory of the rank could not be opened.
        RankEnded: The run ended, or evicted this rank while it was coming in.
        TimeoutError: The rank did not become a member in time.

    Example:
        >>> import tempfile
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from eep_jax import ElasticMoE, MoEConfig, expert_arrays, join, run_config
        >>> from eep_jax import start_supervisor, without_experts
        >>> moe = MoEConfig(hidden=8, expert_hidden=4, experts=4, experts_per_token=2)
        >>> config = run_config(moe, layers=1, ranks=1, slots_per_rank=4, tokens_max=4)
        >>> run_dir = tempfile.mkdtemp()
        >>> supervisor = start_supervisor(run_dir, config)  # ends with this process
        >>> layer, x = ElasticMoE(moe, 0, rngs=nnx.Rngs(0)), jnp.ones((4, 8))
        >>> rest = without_experts(layer)
        >>> me = join(run_dir, 0, lambda routing, x: rest(x, routing), (x,), expert_arrays(layer))
        >>> bool(jnp.allclose(me.run(x), layer(x)[0], atol=1e-5))
        True
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
    engine = StepEngine(config, rank, heap, layout, step, example)
    link = client_of(config, rank, root, token)
    agent = assemble_agent(engine, source, link)
    link.start()
    member = ElasticRank(agent, engine, link, AdminClient(root, rank))
    member._wait_until_member(timeout_s)
    return member
