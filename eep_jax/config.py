"""Configuration of a run: frozen values, one class per component, no JAX."""

import dataclasses

from eep_jax.model_config import ModelConfig as ModelConfig  # re-exported
from eep_jax.model_config import check_positive
from pallas_kernels.sizes import SCALE_CHANNELS

COMBINE_MODES = ("per_choice", "per_rank")
MIRROR_TRANSPORTS = ("auto", "nixl", "tcp")  # auto: NIXL if both ends have it and RDMA
POLICIES = ("fail_closed", "degrade")
PLATFORMS = ("cpu", "gpu")
SOURCES = ("local", "peer", "backup", "checkpoint")
SOURCE_ORDERS = ("measured", "tier")  # the fastest as measured, or as listed in `sources`
DTYPES = ("float32", "bfloat16")
DISPATCH_DTYPES = ("", "float8_e4m3fn")
STEP_SIZES_MAX = 12  # compiled steps of an engine
DTYPE_OF_PLATFORM = {"cpu": "float32", "gpu": "bfloat16"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """Number of ranks, spread of experts, and limits after which a rank is dead. Milliseconds."""

    ranks: int  # R
    slots_per_rank: int  # S
    redundancy: int = 1  # replicas of each expert while all ranks are in
    background_experts: int = 2  # moved to a rank in one epoch of background work; 0: none
    background_bytes_per_s: int = 0  # a rank's read rate for it; 0: no limit
    imbalance_max: float = 1.25  # tolerated ratio of the busiest rank's load to the mean
    policy: str = "fail_closed"  # for experts that find no live slot, see POLICIES
    heartbeat_ms: int = 200
    lease_ms: int = 3_000  # a rank without any heartbeat for longer is dead
    accused_lease_ms: int = 1_500  # the same, for a rank that a peer's step timed out on
    joining_lease_ms: int = 60_000  # the same, for one that is no member and still loads
    channel_grace_ms: int = 1_500  # without a control channel, process not known dead
    stall_ms: int = 15_000  # heartbeats arrive, but the engine loop does not move
    sources: tuple[str, ...] = SOURCES  # sources that a running cluster may use
    source_order: str = "measured"  # their order, see SOURCE_ORDERS
    backup_bytes: int = 0  # host memory of each rank for backups of experts; 0: none
    backup_dir: str = "/dev/shm"  # directory of backups; should be memory
    fetch_deadline_ms: int = 30_000  # for one expert from a backup or the checkpoint
    fetches_at_once: int = 4  # experts read from them in parallel, while one more is written
    formation_ms: int = 120_000  # how long the first epoch waits for all ranks
    fenced_grace_ms: int = 5_000  # for an evicted process to end itself before it is killed
    restart_grace_ms: int = 5_000  # for ranks to find a restarted supervisor
    background_retry_ms: int = 5_000  # pause after a rank could not fetch an expert
    balance_every_ms: int = 30_000  # pause after load was found to need no balancing
    joiner_nice: int = 3  # lowers the priority of a returning process by this; 0: does not
    host_lost_ms: int = 10_000  # a host without members counts as lost after this silence

    def __post_init__(self):
        check_positive(self, "ranks", "slots_per_rank", "redundancy", "heartbeat_ms")
        check_positive(self, "channel_grace_ms", "stall_ms", "fetch_deadline_ms", "fetches_at_once")
        if self.background_experts < 0 or self.background_bytes_per_s < 0:
            raise ValueError(
                f"{self.background_experts=} and {self.background_bytes_per_s=} must not be "
                "negative; 0 does no background work, or does not limit its rate"
            )
        if self.imbalance_max < 1:
            raise ValueError(f"{self.imbalance_max=} must be at least 1, which is even load")
        if self.backup_bytes < 0:
            raise ValueError(f"{self.backup_bytes=} must not be negative; 0 keeps no backups")
        if not self.sources or set(self.sources) - set(SOURCES):
            raise ValueError(f"{self.sources=} must name some of {SOURCES}")
        if self.source_order not in SOURCE_ORDERS:
            raise ValueError(f"{self.source_order=} must be one of {SOURCE_ORDERS}")
        if self.policy not in POLICIES:
            raise ValueError(f"{self.policy=} must be one of {POLICIES}")
        if self.redundancy > self.ranks:
            raise ValueError(
                f"{self.redundancy=} replicas need as many ranks, there are {self.ranks=}"
            )
        if not 0 <= self.joiner_nice <= 19:
            raise ValueError(
                f"{self.joiner_nice=} must be in 0..19, steps of `nice`; 0 lowers nothing"
            )
        if self.lease_ms < 3 * self.heartbeat_ms:
            raise ValueError(f"{self.lease_ms=} must be at least 3 x {self.heartbeat_ms=}")
        if not 0 < self.accused_lease_ms <= self.lease_ms:
            raise ValueError(f"{self.accused_lease_ms=} must be in 1..{self.lease_ms=}")
        if self.joining_lease_ms < self.lease_ms:
            raise ValueError(
                f"{self.joining_lease_ms=} must be at least {self.lease_ms=}: a rank that loads "
                "disturbs nobody, and may be given less processor time than members"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Fixed shapes of a rank's steps."""

    batch_rows: int = 8  # B, sequences a rank decodes at once
    prefill_tokens: int = 32  # prompt tokens that the widest step takes beside B decoded ones
    step_rows: tuple[int, ...] = ()  # rows of the narrower steps, ascending; (): one of batch_rows
    context_tokens: int = 512  # P, longest prompt + completion
    page_tokens: int = 64  # G, positions of one page of the KV cache; on a GPU 64
    kv_pages: int = 0  # N, pages of the KV cache; 0: room for all contexts, or what a GPU has left
    prefix_cache: bool = True  # keep the pages of known prefixes while there is room
    gap_ms: int = 0  # wanted time between tokens while prompts are read beside; 0: no limit
    row_tile: int = 8  # rows of one matrix product; results do not depend on other tiles
    combine: str = "per_choice"  # see COMBINE_MODES
    step_deadline_ms: int = 2_000  # how long a step waits for a peer
    waiting_max: int = 256  # requests a rank holds beyond its batch rows
    dtype: str = "float32"  # of weights, KV cache, rows and bank, see DTYPES
    dispatch_dtype: str = ""  # of rows on their way to experts, "" is dtype, see DISPATCH_DTYPES

    def __post_init__(self):
        check_positive(
            self, "batch_rows", "prefill_tokens", "context_tokens", "row_tile", "step_deadline_ms"
        )
        check_positive(self, "page_tokens")
        if self.kv_pages and self.kv_pages < self.pages_per_sequence:
            raise ValueError(
                f"{self.kv_pages=} of {self.page_tokens} positions cannot hold one context of "
                f"{self.context_tokens=}: at least {self.pages_per_sequence}, or 0 for as many as "
                "there is room for"
            )
        if self.gap_ms < 0:
            raise ValueError(f"{self.gap_ms=} must not be negative; 0 sets no limit")
        for name, allowed in (
            ("combine", COMBINE_MODES),
            ("dtype", DTYPES),
            ("dispatch_dtype", DISPATCH_DTYPES),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} must be one of {allowed}")
        for name in ("batch_rows", "prefill_tokens"):
            if getattr(self, name) % self.row_tile:
                raise ValueError(
                    f"{name}={getattr(self, name)} must be a multiple of {self.row_tile=}"
                )
        sizes, ascending = self.step_sizes, sorted(set(self.step_sizes))
        if (
            len(sizes) > STEP_SIZES_MAX
            or list(sizes) != ascending
            or any(size <= 0 or size % self.row_tile for size in sizes)
        ):
            raise ValueError(
                f"{self.step_rows=} must be at most {STEP_SIZES_MAX - 1} numbers below "
                f"batch_rows + prefill_tokens = {self.tokens_max}, ascending, each a multiple of "
                f"{self.row_tile=}"
            )

    @property
    def step_sizes(self) -> tuple[int, ...]:
        """The numbers of rows that there are steps for, ascending; the last is `tokens_max`."""
        return (*(self.step_rows or (self.batch_rows,)), self.tokens_max)

    @property
    def pages_per_sequence(self) -> int:
        """J, the most pages that a sequence can need."""
        return -(-self.context_tokens // self.page_tokens)

    @property
    def tokens_max(self) -> int:
        """T, the rows of the widest step."""
        return self.batch_rows + self.prefill_tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """HTTP API, control channel, and addresses of ranks."""

    host: str = "127.0.0.1"
    port: int = 8000  # 0: any free port
    api_key_file: str = ""  # keys of clients, one a line; "": completions need no key
    admin_key_file: str = ""  # keys for status and changes of the cluster; "": see http/access.py
    allowed_hosts: tuple[str, ...] = ()  # further names of this service, as clients write them
    control_host: str = "127.0.0.1"
    control_port: int = 0  # 0: any free port, which ranks read from the run directory
    backup_host: str = "127.0.0.1"  # address at which ranks serve backups to each other
    mirror_host: str = ""  # address of this rank for other hosts; "": all ranks on one host
    mirror_transport: str = "auto"  # of rows between hosts, see MIRROR_TRANSPORTS
    connections_max: int = 4096  # of clients at once; the idle ones make room
    connections_per_address_max: int = 4096  # of them, from one address
    head_deadline_ms: int = 10_000  # for the head of a request to arrive on a new connection
    queue_max: int = 256  # unfinished requests, beyond which HTTP answers 429
    message_bytes_max: int = 4 << 20  # largest message on the control channel
    journal_texts: bool = True  # whether the journal holds prompts and answers, or only their ids
    finished_max: int = 512  # finished requests kept for clients that ask again
    served_model_name: str = ""  # name of the model in requests and answers; "": its own
    cors_origins: tuple[str, ...] = ()  # origins of pages that may read answers; ("*",): all
    ready_while_changing: bool = False  # whether /readyz is 200 during a change of members
    access_log: bool = False  # whether a line is logged for every HTTP request
    keep_alive_ms: int = 10_000  # silence after which a stream sends a comment; 0: never
    shutdown_timeout_s: float = 10.0  # for running requests to finish once a stop is wished for

    def __post_init__(self):
        check_positive(self, "connections_max", "connections_per_address_max", "head_deadline_ms")
        if self.keep_alive_ms < 0 or self.shutdown_timeout_s < 0:
            raise ValueError(
                f"{self.keep_alive_ms=} and {self.shutdown_timeout_s=} must not be negative; 0 "
                "sends no comments and waits for no request"
            )
        if self.mirror_transport not in MIRROR_TRANSPORTS:
            raise ValueError(f"{self.mirror_transport=} must be one of {MIRROR_TRANSPORTS}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceConfig:
    """Shares of a GPU's memory. Unused on CPU.

    The JAX allocators of all ranks on one GPU together take `memory_fraction` of its memory, for
    dense weights, KV cache and temporaries of a step. The launcher gives each rank its share. The
    slabs of the heap (window and experts) and about 0.6 GiB of CUDA context per rank take the rest.

    When memory runs out: if JAX reports RESOURCE_EXHAUSTED, lower `engine.kv_pages` or
    `engine.prefill_tokens`, or raise `memory_fraction`; if
    the heap cannot be opened, lower `memory_fraction` or `cluster.slots_per_rank`, or put fewer
    ranks on a GPU.
    """

    memory_fraction: float = 0.6

    def __post_init__(self):
        if not 0 < self.memory_fraction < 1:
            raise ValueError(f"{self.memory_fraction=} must be between 0 and 1, exclusively")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One run: the model and its weights, and every component's configuration.

    Serving needs either `checkpoint` or `random_weights`.

    Raises:
        ValueError: The parts do not fit each other; the message names both values.
    """

    name: str
    model: ModelConfig
    cluster: ClusterConfig
    engine: EngineConfig = EngineConfig()
    serve: ServeConfig = ServeConfig()
    device: DeviceConfig = DeviceConfig()
    platform: str = "cpu"  # of the computation, see PLATFORMS
    checkpoint: str = ""  # directory of launch.convert or launch.train_tiny, or of Hugging Face
    random_weights: int | None = None  # seed of random weights instead of a checkpoint
    tokenizer: str = ""  # directory of tokenizer.json, or "bytes"; "": the checkpoint's

    def __post_init__(self):
        if self.random_weights is not None and not 0 <= self.random_weights < 1 << 32:
            raise ValueError(f"{self.random_weights=} is a seed, must be in 0..{(1 << 32) - 1}")
        self._check_room()
        self._check_context()
        self._check_dtypes()

    @property
    def kv_pages(self) -> int:
        """N, the pages of a rank's KV cache: as configured, else room for all contexts."""
        return self.engine.kv_pages or self.engine.batch_rows * self.engine.pages_per_sequence

    def _check_room(self) -> None:
        slots = self.cluster.ranks * self.cluster.slots_per_rank
        if slots < self.model.experts * self.cluster.redundancy:
            raise ValueError(
                f"{self.cluster.ranks} ranks x {self.cluster.slots_per_rank} slots = {slots} "
                f"slots, but {self.model.experts} experts x redundancy {self.cluster.redundancy} "
                f"need {self.model.experts * self.cluster.redundancy}; raise slots_per_rank"
            )

    def _check_context(self) -> None:
        rope, context = self.model.rope, self.engine.context_tokens
        if rope.kind == "dynamic" and context > rope.original_positions:
            raise ValueError(
                f"dynamic RoPE would stretch {context=} tokens, which changes with every token and "
                f"is not supported; set engine.context_tokens <= {rope.original_positions}"
            )

    def _check_dtypes(self) -> None:
        engine = self.engine
        if engine.dispatch_dtype and engine.dtype != "bfloat16":
            raise ValueError(
                f"{engine.dispatch_dtype=} narrows bfloat16 rows, but {engine.dtype=}; set "
                "engine.dtype=bfloat16 or engine.dispatch_dtype="
            )
        if engine.dispatch_dtype and self.model.hidden % SCALE_CHANNELS:
            raise ValueError(
                f"{engine.dispatch_dtype=} has one scale per {SCALE_CHANNELS} channels, so "
                f"{self.model.hidden=} must be a multiple of it; else set engine.dispatch_dtype="
            )
        if self.platform not in PLATFORMS:
            raise ValueError(f"{self.platform=} must be one of {PLATFORMS}")
        needed = DTYPE_OF_PLATFORM[self.platform]
        if engine.dtype != needed:
            raise ValueError(
                f"{self.platform=} computes in {needed}, not in {engine.dtype=}; set "
                f"engine.dtype={needed}, or the platform of {engine.dtype}"
            )
