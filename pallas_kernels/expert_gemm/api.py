"""The experts of this rank inside a compiled step."""

from jaxtyping import Array, Float, Int32

from pallas_kernels.expert_gemm.host import expert_gemm_tiles


def expert_gemm(
    rows: Float[Array, "R T D"],
    slots: Int32[Array, "R T K"],
    bank: Float[Array, "S L 3 F D"],
    *,
    layer: int,
    tile_rows: int = 8,
) -> Float[Array, "R T K D"]:
    """SwiGLU of every received choice: `y[s, t, k] = down(silu(gate(x)) * up(x))`, x = rows[s, t].

    `slots` are slots of this rank, -1 for a choice that lies elsewhere; its result is zero. `bank`
    holds all layers of all slots; only `layer` is read. Raises ValueError for shapes that disagree.
    """
    if rows.shape[:2] != slots.shape[:2] or rows.shape[-1] != bank.shape[-1]:
        raise ValueError(f"{rows.shape=}, {slots.shape=} and {bank.shape=} do not belong together")
    if not 0 <= layer < bank.shape[1]:
        raise ValueError(f"{layer=} is not in 0..{bank.shape[1] - 1}")
    return expert_gemm_tiles(rows, slots, bank, layer, tile_rows)
