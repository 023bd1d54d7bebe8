"""Checks of messages against the run, beyond the types that the codec checks.

Each raises ProtocolError for an impossible value.
"""

from eep_jax.config import SOURCES, RunConfig
from eep_jax.coordination.protocol import Status
from eep_jax.engine.request import NOT_FINITE, Progress
from eep_jax.errors import ProtocolError
from eep_jax.runtime.control.messages import Hello, Telemetry

PIDS_MAX = 4 << 20  # of Linux
FINISHES = ("", "length", "stop", NOT_FINITE)


def check_hello(hello: Hello, config: RunConfig) -> None:
    """Rank in range, run name equal, pid plausible."""
    if not 0 <= hello.rank < config.cluster.ranks:
        raise ProtocolError(f"rank {hello.rank} is not in 0..{config.cluster.ranks - 1}")
    if hello.run != config.name:
        raise ProtocolError(f"rank {hello.rank} runs {hello.run!r}, this is {config.name!r}")
    if not 0 < hello.pid < PIDS_MAX:
        raise ProtocolError(f"rank {hello.rank}: its pid is {hello.pid}, not in 1..{PIDS_MAX - 1}")


def check_status(status: Status, rank: int, incarnation: int, config: RunConfig) -> None:
    """Sent by the process of this channel; ranks, experts and sources exist."""
    if (status.rank, status.incarnation) != (rank, incarnation):
        raise ProtocolError(
            f"a Status of rank {status.rank} incarnation {status.incarnation} on the channel "
            f"of rank {rank} incarnation {incarnation}"
        )
    cluster = config.cluster
    if len(status.contents) not in (0, cluster.slots_per_rank):  # none while it loads
        raise ProtocolError(f"{len(status.contents)} slots, expected {cluster.slots_per_rank}")
    if not set(status.backup.experts) <= set(range(config.model.experts)):
        raise ProtocolError(f"backups of {status.backup.experts!r:.80}, not all are experts")
    if not set(status.rates) <= set(SOURCES):
        raise ProtocolError(f"rates of {set(status.rates)!r:.80}, expected some of {SOURCES}")
    if any(not 0 <= accused < cluster.ranks for accused in status.accused):
        raise ProtocolError(f"accused ranks {status.accused} are not all in 0..{cluster.ranks - 1}")


def check_telemetry(telemetry: Telemetry, rank: int, config: RunConfig) -> None:
    """Counts for all experts or for none."""
    experts, chosen = config.model.experts, telemetry.chosen
    if len(chosen) not in (0, experts) or any(count < 0 for count in chosen):
        raise ProtocolError(f"rank {rank} counted {chosen!r:.80}, expected {experts} counts")


def check_progress(progress: Progress, rank: int, config: RunConfig) -> None:
    """Tokens in the vocabulary, and a finish that a rank may report."""
    if progress.finish not in FINISHES:
        raise ProtocolError(f"rank {rank} ends {progress.id} with {progress.finish!r:.40}")
    if any(not 0 <= token < config.model.vocab_size for token in progress.tokens):
        raise ProtocolError(f"rank {rank} produced {progress.tokens!r:.80}, not all are tokens")
