"""Memory of a rank on its GPU, in bytes, computed before any allocation. Without JAX.

heap   window and bank of experts, and a dummy for absent peers: CUDA virtual memory
JAX    dense weights, KV cache and a step's temporaries: reserved at start, as a fraction of the GPU
CUDA   a context, with its compiled code
"""

import dataclasses
import math

from eep_jax.config import ModelConfig, RunConfig
from pallas_kernels.attention.plan import CHUNK_TOKENS
from pallas_kernels.window import WindowLayout, round_up

# As nvidia-smi reports; nearly all is available to a process.
GPU_BYTES = {"h100": 81_559 << 20, "h200": 143_771 << 20}
CONTEXT_BYTES = 600 << 20  # measured on an H100: 0.5 to 0.6 GiB
MAPPED_BYTES = 32 << 20  # granularity of the heap
RESERVE_BYTES = 512 << 20  # of a GPU, left free by every plan
_BANK_MULTIPLE = 64  # channels of an expert on a GPU are padded to it
_BYTES = {"bfloat16": 2, "float32": 4}
BLOCK_TOKENS = {"cpu": 64, "gpu": 512}  # that `paged_attention` reads at once


@dataclasses.dataclass(frozen=True, kw_only=True)
class RankMemory:
    """Bytes of one rank, by purpose."""

    experts: int  # the bank: slots x one expert over all layers
    window: int  # rows and results in transit between ranks
    dummy: int  # mapped over the slab of every absent peer
    embeddings: int  # with the head
    attention: int  # with norms
    routers: int
    shared: int  # shared experts and dense layers
    cache: int  # of keys and values
    step: int  # estimated: gathered keys, activations, logits
    context: int  # of CUDA

    @property
    def dense(self) -> int:
        """Weights outside the bank."""
        return self.embeddings + self.attention + self.routers + self.shared

    @property
    def heap(self) -> int:
        return round_up(self.experts + self.window, MAPPED_BYTES) + self.dummy

    @property
    def jax(self) -> int:
        """Bytes that `device.memory_fraction` must leave to a rank."""
        return self.dense + self.cache + self.step

    @property
    def total(self) -> int:
        return self.heap + self.jax + self.context


def memory_per_rank(config: RunConfig) -> RankMemory:
    """Memory of each rank of this run, from the shapes that it will allocate.

    `experts`, `window`, `cache` and the weights are exact. Qwen3-30B-A3B in bfloat16 has experts of
    432 MiB over all its 48 layers: 64 slots are 27 GiB.
    """
    model, engine, cluster = config.model, config.engine, config.cluster
    item = _BYTES[engine.dtype]
    dense = {name: count * item for name, count in dense_elements(model).items()}
    tokens = engine.batch_rows + engine.prefill_tokens
    window = WindowLayout(
        ranks=cluster.ranks,
        tokens=tokens,
        choices=model.experts_per_token,
        hidden=model.hidden,
        combine=engine.combine,
        row_dtype=engine.dtype,
        dispatch_dtype=engine.dispatch_dtype,
    )
    return RankMemory(
        experts=cluster.slots_per_rank * expert_bytes(config),
        window=window.window_bytes,
        dummy=MAPPED_BYTES if config.platform == "gpu" else 0,
        cache=config.kv_pages * page_bytes(config),
        step=_step_bytes(config, tokens, item),
        context=CONTEXT_BYTES if config.platform == "gpu" else 0,
        **dense,
    )


def page_bytes(config: RunConfig) -> int:
    """Bytes of one page of the KV cache over all layers."""
    item = _BYTES[config.engine.dtype]
    token = 4  # its id, beside its keys and values
    return config.engine.page_tokens * (config.model.cache_elements * item + token)


def expert_bytes(config: RunConfig) -> int:
    """Bytes of one expert over all layers in its slot: on a GPU F is padded."""
    layers, matrices, width, hidden = config.model.expert_shape
    dtype = config.engine.dtype
    padded = round_up(width, _BANK_MULTIPLE if dtype == "bfloat16" else 1)
    return math.prod((layers, matrices, padded, hidden)) * _BYTES[dtype]


def dense_elements(model: ModelConfig) -> dict[str, int]:
    """Number of weights outside the routed experts by kind; in total `model.dense_parameters`."""
    hidden = model.hidden
    router = model.router.bias + model.router.correction
    kinds = {
        "embeddings": (1 if model.tied_embeddings else 2) * model.vocab_size * hidden + hidden,
        "routers": model.moe_layers * model.experts * (hidden + router),
        "shared": model.moe_layers * hidden * (3 * model.shared_hidden + model.shared_gate)
        + model.dense_layers * 3 * hidden * model.dense_hidden,
    }
    return kinds | {"attention": model.dense_parameters - sum(kinds.values())}


def _step_bytes(config: RunConfig, tokens: int, item: int) -> int:
    """Upper estimate of a step's temporaries, without its arguments."""
    model, engine = config.model, config.engine
    # One tile of rows gathers a block of keys and values of its sequences, a layer at a time.
    block = min(max(BLOCK_TOKENS[config.platform], engine.page_tokens), engine.context_tokens)
    gathered = engine.row_tile * block * model.cache_elements // model.layers * item
    # Attention on a GPU keeps the sums of each chunk of a long context.
    chunks = -(-engine.context_tokens // CHUNK_TOKENS)
    heads = model.query_heads * (model.head_dim + 2)
    sums = tokens * heads * chunks * 4 if chunks > 1 and not model.latent else 0
    # The sampler sorts the logits of each sequence: several float32 arrays of them.
    logits = 6 * engine.batch_rows * model.vocab_size * 4
    channels = 8 * model.hidden + 4 * model.query_heads * model.head_dim + 3 * model.dense_hidden
    routed = model.experts_per_token * (3 * model.expert_hidden + model.hidden)
    # Rows of all ranks may arrive here; half of them far exceeds real routing.
    received = config.cluster.ranks * tokens * routed // 2
    return (
        2 * gathered
        + sums
        + logits
        + (tokens * (channels + 3 * model.shared_hidden) + received) * 4
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fit:
    """Placement of the ranks of a run on GPUs of one kind; bytes of the fullest GPU."""

    gpu_bytes: int
    ranks_per_gpu: int
    jax_share: int  # reserved by JAX in one rank
    needed: RankMemory

    @property
    def used(self) -> int:
        """Bytes in use once all ranks of the GPU serve."""
        each = self.needed.heap + self.jax_share + self.needed.context
        return self.ranks_per_gpu * each

    @property
    def free(self) -> int:
        return self.gpu_bytes - self.used


def check_fit(config: RunConfig, gpu: str, gpus: int) -> Fit:
    """Fit of the run on `gpus` GPUs of a kind in GPU_BYTES, with RESERVE_BYTES free on each.

    Raises ValueError naming what is too large and which value to change.
    """
    if gpu not in GPU_BYTES or gpus < 1:
        raise ValueError(f"{gpu=} must be one of {sorted(GPU_BYTES)}, and {gpus=} at least 1")
    needed, sharing = memory_per_rank(config), -(-config.cluster.ranks // gpus)
    share = int(GPU_BYTES[gpu] * config.device.memory_fraction / sharing)
    fit = Fit(gpu_bytes=GPU_BYTES[gpu], ranks_per_gpu=sharing, jax_share=share, needed=needed)
    if share < needed.jax:
        fitting = max(0, (share - needed.jax + needed.cache) // page_bytes(config))
        raise ValueError(
            f"{config.name}: JAX has {_gib(share)} in each rank, and needs {_gib(needed.jax)}; "
            f"raise device.memory_fraction, or set engine.kv_pages to at most {fitting}, "
            f"now {config.kv_pages}"
        )
    if fit.free < RESERVE_BYTES:
        raise ValueError(
            f"{config.name}: {sharing} ranks take {_gib(fit.used)} of {gpu} with "
            f"{_gib(fit.gpu_bytes)}; {_gib(RESERVE_BYTES)} must stay free: lower "
            "cluster.slots_per_rank or device.memory_fraction, or take more GPUs"
        )
    return fit


def describe(config: RunConfig, gpu: str, gpus: int) -> str:
    """Table of a rank's memory, and the losses that the run survives. Raises like check_fit."""
    fit, model, cluster = check_fit(config, gpu, gpus), config.model, config.cluster
    n, one = fit.needed, _gib(expert_bytes(config))
    without_loading, at_all = losses_covered(config)
    rows = (
        ("experts", n.experts, f"heap  {cluster.slots_per_rank} slots x {one}"),
        ("window", n.window + n.dummy, "heap"),
        ("embeddings", n.embeddings, "JAX   with the head"),
        ("attention", n.attention, "JAX"),
        ("routers", n.routers, "JAX"),
        ("shared", n.shared, "JAX   shared experts, dense layers"),
        ("KV cache", n.cache, f"JAX   {_cache_of(config)}"),
        ("step", n.step, "JAX   estimated"),
        (
            "unused",
            fit.jax_share - n.jax,
            f"JAX   takes {config.device.memory_fraction:g} of a GPU; room for "
            f"{(fit.jax_share - n.jax) // page_bytes(config)} pages more",
        ),
        ("context", n.context, "CUDA"),
    )
    lines = [f"{name:<11}{_gib(size):>10}  {where}".rstrip() for name, size, where in rows]
    lines += [
        f"{'in all':<11}{_gib(fit.used // fit.ranks_per_gpu):>10}  x {fit.ranks_per_gpu} of "
        f"{_gib(fit.gpu_bytes)}",
        f"{model.experts} experts on {cluster.ranks} ranks: up to {at_all} may die, "
        f"up to {without_loading} with nothing to load",
    ]
    return "\n".join(lines)


def _cache_of(config: RunConfig) -> str:
    pages, size = config.kv_pages, config.engine.page_tokens
    return f"{pages} pages x {size} positions = {pages * size / 1024:.0f} Ki"


def losses_covered(config: RunConfig) -> tuple[int, int]:
    """(ranks that may die at once without any expert being loaded, ranks that may die at all).

    The first follows from redundancy, the second from the slots that remain.
    """
    cluster, experts = config.cluster, config.model.experts
    needed = -(-experts // cluster.slots_per_rank)
    return cluster.redundancy - 1, cluster.ranks - needed


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
