"""The experts of this rank inside a compiled step."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.device import platform
from pallas_kernels.expert_gemm.config import GemmConfig, config_for
from pallas_kernels.expert_gemm.host import expert_gemm_tiles
from pallas_kernels.expert_gemm.mlp import SWIGLU, ExpertMlp
from pallas_kernels.grouping import group_rows, tile_rows_for


@jax.named_scope("expert_gemm")
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
    """Runs the expert of every received choice; the specification is `expert_gemm_reference`.

    `y[s, t, k] = down(silu(gate(x)) * up(x))` for x = rows[s, t], or the function of `mlp`.

    Args:
        rows: received rows, or on a GPU those that dispatch left in the window.
        slots: slots of this rank; -1 for a choice that runs elsewhere.
        bank: weights of all layers of all slots; on a GPU bfloat16, F and D multiples of 64.
        layer: the only layer that is read; as an int32 scalar, which is not checked, it is data.
        tile_rows: on CPU, rows of one product.
        config: on a GPU, the launch configuration; chosen by shape if None.
        mlp: activation and biases.
        send_home: on a GPU with `per_choice`, write the results of rows in the window straight into
            the windows of their sources; only `combine` can take them, and posts the flags.

    Returns:
        The results. Those of choices that run elsewhere are zero on CPU and undefined on a GPU.
        With `send_home` a `handover.ResultsAtHome`, if the mode allows it.

    Raises:
        ValueError: shapes that disagree, or a layer out of range.
        NotImplementedError: shapes or dtypes that this device's implementation does not take.
    """
    if rows.shape[:2] != slots.shape[:2] or rows.shape[-1] != bank.shape[-1]:
        raise ValueError(f"{rows.shape=}, {slots.shape=} and {bank.shape=} do not belong together")
    if isinstance(layer, int) and not 0 <= layer < bank.shape[1]:
        raise ValueError(f"{layer=} is not in 0..{bank.shape[1] - 1}")
    if platform() == "gpu":
        return _on_gpu(rows, slots, bank, layer, config, send_home, mlp)
    return expert_gemm_tiles(rows, slots, bank, layer, tile_rows, mlp)


def _on_gpu(
    rows: "Float[Array, 'R T D'] | RowsInWindow",
    slots: Int32[Array, "R T K"],
    bank: Float[Array, "S L 3 F D"],
    layer: "int | Int32[Array, '']",
    config: GemmConfig | None,
    send_home: bool,
    mlp: ExpertMlp,
) -> "Float[Array, 'R T K D'] | ResultsAtHome":
    # Imported here: the CPU path does not need Mosaic GPU.
    from pallas_kernels.expert_gemm.mosaic_gpu import Experts, expert_gemm_mosaic
    from pallas_kernels.handover import InArray, RowsInWindow

    num_slots, _, _, width, hidden = bank.shape
    if bank.dtype != jnp.bfloat16:
        raise NotImplementedError(f"a bank of {bank.dtype}: the GPU kernels take bfloat16")
    homes = None
    if isinstance(rows, RowsInWindow):
        tile_rows = rows.tile_rows
        rows_per_slot = slots[0].size / num_slots  # every rank sends as much, to all slots alike
        source, lists = rows.source(), rows.lists
        homes = rows.homes() if send_home else None
    else:
        rows_per_slot = slots.size / num_slots
        tile_rows = config.tile_rows if config else tile_rows_for(rows_per_slot)
        source = InArray(rows.astype(jnp.bfloat16), slots.shape[2])
        lists = group_rows(slots, num_slots, tile_rows)
    width = mlp.bias_width or width
    config = config or config_for(tile_rows, num_slots, width, hidden, rows_per_slot)
    if mlp.bias_width > hidden and hidden % config.tile_columns:
        raise NotImplementedError(
            f"biases of F={mlp.bias_width} in rows of D={hidden}: {config.tile_columns=} must "
            "divide D, or a tile's biases would lie in two rows"
        )
    if config.tile_rows != tile_rows:
        raise ValueError(f"{config.tile_rows=}, but dispatch listed tiles of {tile_rows} rows")
    experts = Experts(bank, layer, mlp)
    return expert_gemm_mosaic(source, slots.shape, lists, experts, config, homes)
