"""Reader of the layers in config.json: which of them have no experts, and which have a window."""

from collections.abc import Callable

from eep_jax.errors import CheckpointError
from eep_jax.models.families.config_json import Fields

WINDOW, WHOLE = "sliding_attention", "full_attention"
_KINDS, _FIRST, _ONLY = "mlp_layer_types", "first_k_dense_replace", "mlp_only_layers"


def counted_plain_layers(fields: Fields, layers: int) -> int:
    """The number of first layers without experts, which `first_k_dense_replace` gives.

    Raises CheckpointError if `mlp_layer_types` is given as well and says something else.
    """
    count, kinds = fields.take(_FIRST), fields.layer_kinds(_KINDS, layers, "dense", "sparse")
    if kinds and kinds != ["dense"] * count + ["sparse"] * (layers - count):
        raise CheckpointError(
            f"{fields.path}: {_FIRST}={count} and {_KINDS}={kinds} differ; keep one"
        )
    return count


def listed_plain_layers(fields: Fields, layers: int) -> int:
    """The number of first layers that `mlp_layer_types` calls dense; one unless there is a list.

    Raises CheckpointError if others are dense as well, or `first_k_dense_replace` says something
    else.
    """
    kinds = fields.layer_kinds(_KINDS, layers, "dense", "sparse")
    kinds = kinds or ["dense"] + ["sparse"] * (layers - 1)
    count = _first(fields, _KINDS, [kind == "dense" for kind in kinds])
    fields.require(_FIRST, count)
    return count


def excepted_plain_layers(fields: Fields, layers: int) -> dict:
    """The ModelConfig fields of the layers in `mlp_only_layers`, which must be the first ones."""
    fields.require("decoder_sparse_step", 1)
    fields.read.add("intermediate_size")  # without effect if there are none
    listed = fields.take(_ONLY, list, null=[])
    if not all(isinstance(layer, int) for layer in listed):
        raise CheckpointError(f"{fields.path}: {_ONLY}={listed} must be numbers of layers")
    count = _first(fields, _ONLY, [layer in listed for layer in range(layers)])
    width = fields.take("intermediate_size") if count else 0
    return {"dense_layers": count, "dense_hidden": width}


def windows(fields: Fields, layers: int, slides: Callable[[int], bool]) -> tuple[int, ...]:
    """The attention window of each layer, 0 for none; () if no layer has one.

    Args:
        fields: The file, with `sliding_window`.
        layers: Their number.
        slides: Whether a layer has the window, unless `layer_types` says so.
    """
    kinds = fields.layer_kinds("layer_types", layers, WINDOW, WHOLE)
    kinds = kinds or [WINDOW if slides(layer) else WHOLE for layer in range(layers)]
    fields.read.add("sliding_window")  # without effect if no layer slides
    if WINDOW not in kinds:
        return ()
    window = fields.window()
    if not window:
        raise CheckpointError(f"{fields.path}: sliding_window=None, but layer_types={kinds}")
    return tuple(window if kind == WINDOW else 0 for kind in kinds)


def _first(fields: Fields, name: str, chosen: list[bool]) -> int:
    """The number of leading layers that are chosen; `name` is the field that chooses them."""
    count = next((layer for layer, is_so in enumerate(chosen) if not is_so), len(chosen))
    if any(chosen[count:]):
        where = [layer for layer, is_so in enumerate(chosen) if is_so]
        raise CheckpointError(
            f"{fields.path}: {name}={fields.values.get(name)!r} leaves layers {where} without "
            "experts; only the first layers may have none"
        )
    return count
