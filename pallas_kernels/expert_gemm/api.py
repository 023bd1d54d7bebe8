"""The experts of this rank inside a compiled step."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.device import platform
from pallas_kernels.expert_gemm.config import GemmConfig, config_for, tile_rows_for
from pallas_kernels.expert_gemm.host import expert_gemm_tiles
from pallas_kernels.expert_gemm.mlp import SWIGLU, ExpertMlp


def expert_gemm(
    rows: "Float[Array, 'R T D'] | RowsInWindow",
    slots: Int32[Array, "R T K"],
    bank: Float[Array, "S L 3 F D"],
    *,
    layer: "int | Int32[Array, '']",
    tile_rows: int = 8,
    config: GemmConfig | None = None,
    mlp: ExpertMlp = SWIGLU,
    send_home: bool = False,
) -> "Float[Array, 'R T K D'] | ResultsAtHome":
    """The expert of every received choice: `y[s, t, k] = down(silu(gate(x)) * up(x))`,
    x = rows[s, t], or what `mlp` says instead.

    `slots` are slots of this rank, -1 for a choice that lies elsewhere. `bank` holds all layers of
    all slots; only `layer` is read. Raises ValueError for shapes that disagree.

    On CPU products run over tiles of `tile_rows` rows, and results of other choices are zero. On a
    GPU the bank is bfloat16, rows may be what dispatch left in the window, `config` says how the
    kernels are launched, and results of other choices are not written: they may hold anything.
    There the layer may be an int32 scalar, which must be in range. With `send_home` rows that
    dispatch left in the window are answered at once, where the mode is `per_choice`: results go
    straight into the windows of their sources, and what is returned, a
    `combine.mosaic_gpu.ResultsAtHome`, is for `combine` only, which posts the flags.
    Raises NotImplementedError there unless F and D are multiples of 64.
    """
    if rows.shape[:2] != slots.shape[:2] or rows.shape[-1] != bank.shape[-1]:
        raise ValueError(f"{rows.shape=}, {slots.shape=} and {bank.shape=} do not belong together")
    if isinstance(layer, int) and not 0 <= layer < bank.shape[1]:
        raise ValueError(f"{layer=} is not in 0..{bank.shape[1] - 1}")
    if platform() == "gpu":
        return _on_gpu(rows, slots, bank, layer, config, send_home, mlp)
    return expert_gemm_tiles(rows, slots, bank, layer, tile_rows, mlp)


def _on_gpu(rows, slots, bank, layer, config: GemmConfig | None, send_home: bool, mlp: ExpertMlp):
    # Imported here: the CPU path needs nothing of Mosaic GPU.
    from pallas_kernels.dispatch.mosaic_gpu import RowsInWindow
    from pallas_kernels.expert_gemm import mosaic_gpu

    num_slots, _, _, width, hidden = bank.shape
    if bank.dtype != jnp.bfloat16:
        raise NotImplementedError(f"a bank of {bank.dtype}: the GPU kernels take bfloat16")
    homes = None
    if isinstance(rows, RowsInWindow):
        tile_rows = rows.lists.tile_rows
        rows_per_slot = slots[0].size / num_slots  # every rank sends as much, to all slots alike
        source, lists = mosaic_gpu.expert_rows_of(rows)
        homes = mosaic_gpu.homes_of(rows) if send_home else None
    else:
        rows_per_slot = slots.size / num_slots
        tile_rows = config.tile_rows if config else tile_rows_for(rows_per_slot)
        source = mosaic_gpu.InArray(rows.astype(jnp.bfloat16))
        lists = mosaic_gpu.group_rows(slots, num_slots, tile_rows)
    width = mlp.bias_width or width
    config = config or config_for(tile_rows, num_slots, width, hidden, rows_per_slot)
    if mlp.bias_width > hidden and hidden % config.tile_columns:
        raise NotImplementedError(
            f"biases of F={mlp.bias_width} in rows of D={hidden}, of which {config.tile_columns=} "
            "is no divisor: a tile's biases would lie in two rows"
        )
    if config.tile_rows != tile_rows:
        raise ValueError(f"{config.tile_rows=}, but dispatch listed tiles of {tile_rows} rows")
    return mosaic_gpu.expert_gemm_mosaic(
        source, slots.shape, lists, bank, layer, config, homes, mlp
    )
