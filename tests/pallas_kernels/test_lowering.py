"""Every kernel lowers for an H100 on any machine, and membership is data in all that is lowered.

The last test uses the Pallas interpreter: it follows barriers, copies and matrix instructions of
the expert GEMM's pipelines and detects races. It cannot run inline MLIR, of which the exchanges
consist, nor compute results of the GEMM, which stores its rows with it.
"""

import dataclasses
import functools
import importlib
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from eep_jax.config import RunConfig
from eep_jax.engine.shaping import no_shaping
from eep_jax.engine.step import attends_by_items, empty_batch, make_step
from eep_jax.heap.heap import CONTROL_BYTES
from eep_jax.models.expert_bank import slab_layout
from eep_jax.models.kv_cache import zeros_of_cache
from eep_jax.models.moe_block import ExpertSpread, expert_mlp
from eep_jax.models.weights import dense_names
from eep_jax.tables import solo_tables
from pallas_kernels.combine.api import combine
from pallas_kernels.dispatch.api import dispatch
from pallas_kernels.exchange.call import Choices, ExchangeSpec
from pallas_kernels.expert_gemm import mosaic_gpu as gemm
from pallas_kernels.expert_gemm.api import expert_gemm
from pallas_kernels.expert_gemm.config import GemmConfig, config_for
from pallas_kernels.expert_gemm.mlp import ExpertMlp
from pallas_kernels.grouping import group_rows
from pallas_kernels.handover import InArray
from pallas_kernels.window import WindowLayout
from tests.support.lowering import (
    a_call,
    a_layout,
    kernels,
    like,
    lowered,
    scopes,
    without_kernels,
)

MODES = ("per_choice", "per_rank")
SHAPES = ((8, 4, 128), (128, 8, 7168))  # decode T=8 with the fewest channels; the widest
SLOTS = 8


def exchange(layout: WindowLayout, slots_per_rank=SLOTS, experts=None):
    """A dispatch and a combine as a step has them, with `experts(rows, here, bank)` between."""
    spec = ExchangeSpec(layout, slots_per_rank)

    def run(x, slots, weights, heap, call, bank):
        choices = Choices(slots, weights)
        rows, received, suspicion, vote = dispatch(x, choices, heap, call, spec)
        call, here = call.after(suspicion), received.slots
        if experts:
            results = experts(rows, here, bank)
        else:
            results = jnp.broadcast_to(rows.array()[:, :, None], (*here.shape, layout.hidden))
        y, suspicion = combine(results, received, choices, heap, call, spec)
        return y, suspicion, vote

    return run


def arguments(layout: WindowLayout, call=None, width=128, layers=1, slots_per_rank=SLOTS):
    tokens, choices, hidden = layout.tokens, layout.choices, layout.hidden
    return (
        like((tokens, hidden), jnp.bfloat16),
        like((tokens, choices), np.int32),
        like((tokens, choices), np.float32),
        like((layout.ranks, layout.window_bytes), np.uint8),
        call or a_call(layout.ranks),
        like((slots_per_rank, layers, 3, width, hidden), jnp.bfloat16),
    )


@pytest.mark.parametrize("ranks", [1, 2, 8])
@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
@pytest.mark.parametrize("mode", MODES)
def test_dispatch_and_combine_lower(mode, fp8, ranks):
    for tokens, choices, hidden in SHAPES:
        layout = a_layout(ranks, tokens, choices, hidden, mode, fp8)
        text = lowered(exchange(layout), *arguments(layout))
        # Dispatch, a copy of the rows; send, combine. Only per_rank reads the sources' weights.
        assert len(kernels(text)) == 4 + (mode == "per_rank")


def in_window(config):
    def experts(rows, here, bank):
        return expert_gemm(rows, here, bank, layer=1, config=config)

    return experts


# Each F with each D; tile size and location of the rows alternate, so that all pairs occur.
GEMMS = [
    (width, hidden, (64, 128)[(i + j) % 2], ("window", "array")[(i // 2 + j) % 2])
    for (i, width), (j, hidden) in itertools.product(
        enumerate((128, 768, 2048, 2880)), enumerate((128, 2048, 2880, 7168))
    )
]


@pytest.mark.parametrize(("width", "hidden", "tile_rows", "where"), GEMMS)
def test_the_expert_gemm_lowers(width, hidden, tile_rows, where):
    # Dispatch lists tiles of 128 rows if each of two slots gets many.
    tokens, slots = (64, 2) if tile_rows == 128 else (8, 8)
    layout = a_layout(2, tokens, 4, hidden)
    config = config_for(tile_rows, slots, width, hidden)
    values = arguments(layout, width=width, layers=2, slots_per_rank=slots)
    if where == "window":
        text = lowered(exchange(layout, slots, in_window(config)), *values)
        assert len(kernels(text)) == 5, "one and two of the exchange, no copy of the rows, two here"
        return
    run = lambda rows, slots, bank: expert_gemm(rows, slots, bank, layer=1, config=config)
    received = like((2, tokens, 4), np.int32)
    text = lowered(run, like((2, tokens, hidden), jnp.bfloat16), received, values[-1])
    assert len(kernels(text)) == 2


def test_rows_in_fp8_are_widened_before_the_experts():
    layout = a_layout(2, 8, 4, 256, fp8=True)
    text = lowered(exchange(layout, experts=in_window(None)), *arguments(layout, layers=2))
    assert len(kernels(text)) == 6


@pytest.mark.parametrize("mode", MODES)
def test_profiles_have_the_words_of_the_readme(mode):
    def experts(rows, here, bank):
        return expert_gemm(rows, here, bank, layer=1, send_home=True)

    layout = a_layout(mode=mode)
    around, inside = scopes(exchange(layout, experts=experts), *arguments(layout, layers=2))
    assert {"dispatch", "expert_gemm", "gate_up", "down", "combine"} <= around
    exchanged = {"send", "post", "wait", "list rows", "vote", "send home", "sum"}
    computed = {"find rows", "load", "multiply", "activate"}
    assert exchanged | computed <= inside
    assert ("send home" in around) == ("store" in inside) == (mode == "per_rank")


def assert_the_same_program(texts: list[str]) -> None:
    assert len(set(map(without_kernels, texts))) == 1
    assert all(kernels(text) == kernels(texts[0]) for text in texts)


CALLS = (
    a_call(4),
    a_call(4, rank=3),
    a_call(4, rank=2, active=[1, 0, 1, 1], epoch=3, steps=5, address=77),
    a_call(4, rank=3, active=[0, 0, 0, 1], epoch=2000, steps=2**19, address=2**31),
)


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
@pytest.mark.parametrize("mode", MODES)
def test_no_rank_membership_round_deadline_or_address_is_a_constant(mode, fp8):
    layout = a_layout(4, mode=mode, fp8=fp8, hidden=256)
    experts = in_window(None)
    run = exchange(layout, experts=experts)
    assert_the_same_program([lowered(run, *arguments(layout, c, layers=2)) for c in CALLS])


def a_step(config: RunConfig, rows: int, call=None) -> str:
    """One whole step of the rank of `call`; weights and heap are shapes only."""
    call = call or a_call(config.cluster.ranks, rank=config.cluster.ranks - 1)
    cluster, dtype = config.cluster, jnp.dtype(config.engine.dtype)
    rank = int(call.rank)
    slab = slab_layout(config.model, config.engine, cluster.ranks, cluster.slots_per_rank)
    spread = ExpertSpread(
        exchange=ExchangeSpec(slab.window, slab.slots, slab.slab_bytes),
        tile_rows=config.engine.row_tile,
        mlp=expert_mlp(config.model),
    )
    step, names = make_step(config, spread)
    shapes = dense_names(config.model)
    dense = [
        like(shapes[name].shape, np.float32 if name.endswith("correction") else dtype)
        for name in names
    ]
    tables = solo_tables(cluster.ranks, config.model.experts, cluster.slots_per_rank, rank)
    return lowered(
        step,
        dense,
        like(slab.bank.shape, dtype),
        jax.eval_shape(lambda: zeros_of_cache(config)),
        like((cluster.ranks, CONTROL_BYTES), np.uint8),  # the head only, see `heap_argument`
        tables,
        dataclasses.replace(
            empty_batch(config, rows), shaping=no_shaping(config.engine.batch_rows)
        ),
        call,
    )


def a_config(name: str, layers: int, **engine) -> RunConfig:
    """A configuration of this repository with fewer layers, which all lower alike."""
    config = importlib.import_module(f"configs.{name}").get_config()
    windows = config.model.windows[:layers]
    model = dataclasses.replace(config.model, layers=layers, windows=windows)
    engine = dataclasses.replace(config.engine, **engine)
    return dataclasses.replace(config, model=model, engine=engine)


@pytest.mark.parametrize("size", [0, -1], ids=["narrow", "wide"])
# Query, key and value together, output, router, head; attention where heads fit its kernel.
@pytest.mark.parametrize(("name", "shared"), [("tiny_gpu", 4), ("small_moe_h100x1", 5)])
def test_a_whole_step_lowers_with_the_kernels_of_every_layer(name, shared, size):
    config = a_config(name, layers=2)
    text = a_step(config, config.engine.step_sizes[size])
    assert len(kernels(text)) == 2 * 4 + shared
    if attends_by_items(config):  # else rows are attended in tiles, one after the other
        assert "stablehlo.while" not in text, "a loop keeps the step from being one CUDA graph"


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("qwen3_30b_a3b_h100x1", 1),
        ("qwen3_235b_a22b_h200x8", 1),
        ("deepseek_v3_h200x32", 4),  # of which three have no experts
        ("gpt_oss_120b_h100x8", 2),  # a window and the whole text
        ("mixtral_8x7b_h100x4", 1),
    ],
)
def test_a_decode_step_of_each_published_model_lowers(name, layers):
    config = a_config(name, layers)
    assert len(kernels(a_step(config, config.engine.batch_rows))) >= 4


@pytest.mark.parametrize("tile_rows", [64, 128])
def test_experts_with_biases_and_a_clamped_activation_lower(tile_rows):
    mlp = ExpertMlp("clamped_swiglu", bias_width=2880)
    config = config_for(tile_rows, 8, 2880, 2880)
    run = lambda *values: expert_gemm(*values, layer=1, config=config, mlp=mlp)
    rows, slots = like((2, 8, 2880), jnp.bfloat16), like((2, 8, 4), np.int32)
    bank = like((8, 2, 3, 2944, 2880), jnp.bfloat16)  # 2880, a row of biases, zeros
    assert len(kernels(lowered(run, rows, slots, bank))) == 2
    wide = ExpertMlp("swiglu", bias_width=384)
    narrow = like((8, 2, 3, 448, 192), jnp.bfloat16)  # biases of 384 in rows of 192
    with pytest.raises(NotImplementedError, match="would lie in two rows"):
        config = GemmConfig(tile_rows=64, tile_columns=128, down_columns=64)
        run = lambda *values: expert_gemm(*values, layer=1, config=config, mlp=wide)
        lowered(run, like((2, 8, 192), jnp.bfloat16), slots, narrow)


@pytest.mark.parametrize(
    ("engine", "of_a_layer"),
    [({"combine": "per_rank"}, 6 + 4), ({"dispatch_dtype": "float8_e4m3fn"}, 5 + 4)],
    ids=["per_rank", "fp8"],
)
def test_a_decode_step_lowers_in_the_other_modes(engine, of_a_layer):
    config = a_config("tiny_gpu", layers=1, **engine)
    text = a_step(config, config.engine.batch_rows)
    assert len(kernels(text)) == of_a_layer


def test_a_step_is_the_same_program_in_every_epoch_and_on_every_rank():
    config = a_config("tiny_gpu", layers=1)
    step = functools.partial(a_step, config, config.engine.batch_rows)
    assert_the_same_program([step(call=call) for call in CALLS])


def test_the_pipelines_of_the_expert_gemm_have_no_race(capfd):
    """Barriers order reads and writes of staged weights and rows, and all arrivals are matched.

    Inline parts are ignored, so only operands that the copy engine brings are followed.
    """
    config = GemmConfig(tile_columns=64, stages=4, down_stages=3, blocks=2)
    slots = np.random.default_rng(0).integers(0, 2, (1, 96, 2)).astype(np.int32)
    lists = group_rows(slots, 2, config.tile_rows)
    experts = gemm.Experts(jnp.ones((2, 1, 3, 128, 128), jnp.bfloat16), layer=0)
    h = jnp.ones((lists.tiles_max * config.tile_rows, 128), jnp.bfloat16)
    rows = InArray(jnp.ones((1, 96, 128), jnp.bfloat16), choices=2)
    common = (lists, experts, config)
    interpreter = plgpu.InterpretGPUParams(detect_races=True, inline_mgpu="ignore")
    refused = ""
    with plgpu.force_gpu_interpret_mode(interpreter):
        try:
            y, g = gemm.down(h, slots.shape, *common), gemm.gate_up(rows, *common)
            jax.block_until_ready((y, g))
        except jax.errors.JaxRuntimeError as error:
            refused = str(error)
    assert "RACE" not in refused + capfd.readouterr().out
    if refused:
        # Up to JAX 0.11 the interpreter requires a wait for every last arrival, here at `free` of
        # the last tile's stages, and raises when the kernel has ended.
        assert "had only observed barrier up to phase" in refused
        pytest.skip("the interpreter of JAX 0.11 refuses barriers that end with an arrival")
