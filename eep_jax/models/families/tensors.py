"""Keys, shapes and layouts of our weights in the files of a Hugging Face directory."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from eep_jax.model_config import ModelConfig

GATE, UP, DOWN = range(3)  # the second axis of an expert


def as_stored(array: np.ndarray) -> np.ndarray:
    return array


def transposed(array: np.ndarray) -> np.ndarray:
    """torch's Linear stores `[out, in]`; ours is `[in, out]`."""
    return array.T


@dataclasses.dataclass(frozen=True)
class Stored:
    """One tensor: its key and shape in the file, and `form`, which converts it to our layout.

    `index` selects one expert of a fused tensor, along the first axis, and `rows` a range of what
    remains. `shape` is that of the whole tensor; `form` receives the part.
    """

    key: str
    shape: tuple[int, ...]
    form: Callable[[np.ndarray], np.ndarray] = as_stored
    index: int | None = None
    rows: tuple[int, int] | None = None


@dataclasses.dataclass(frozen=True)
class ExpertPart:
    """One matrix `[F D]` of one expert and layer (GATE, UP, DOWN transposed), or its bias."""

    layer: int  # among the layers with experts
    matrix: int
    stored: Stored
    bias: bool = False


@dataclasses.dataclass(frozen=True)
class Family:
    """Conversion of the checkpoints of some architectures.

    `config(fields, name)` returns the ModelConfig, `dense(model)` the tensors by our names,
    `expert(model, e)` the parts of one expert; each of `fused` does so for files that have all
    experts of a layer in one tensor. `renamed` are parts of keys, and what files converted by
    transformers 5 have instead. `defaults` are the values of absent fields of config.json, as in
    transformers; a field without one is required. `without_effect` are fields that change no logit
    in this family.
    """

    architectures: tuple[str, ...]
    config: Callable
    dense: Callable[[ModelConfig], dict[str, Stored]]
    expert: Callable[[ModelConfig, int], Iterator[ExpertPart]]
    fused: tuple[Callable[[ModelConfig, int], Iterator[ExpertPart]], ...] = ()
    renamed: tuple[tuple[str, str], ...] = ()
    defaults: Mapping = dataclasses.field(default_factory=dict)
    without_effect: frozenset[str] = frozenset()


def decoder_tensors(
    model: ModelConfig,
    *,
    block: str = "mlp",
    router: str = "gate",
    shared: str = "shared_expert",
    correction: str = "",
) -> dict[str, Stored]:
    """All weights outside the experts, under the keys that most families share.

    `block` names a layer's module of router and experts; `router`, `shared` and `correction` are
    names in it, `correction` that of the router's correction unless it is in the router.
    """
    hidden, vocab = model.hidden, model.vocab_size
    found = {
        "embed/embedding": Stored("model.embed_tokens.weight", (vocab, hidden)),
        "final_norm/scale": Stored("model.norm.weight", (hidden,)),
    }
    if not model.tied_embeddings:
        found["head/kernel"] = _linear("lm_head", hidden, vocab)
    for layer in range(model.layers):
        ours, theirs = f"layers/{layer}", f"model.layers.{layer}"
        for name, key in (
            ("attention_norm", "input_layernorm"),
            ("moe_norm", "post_attention_layernorm"),
        ):
            found[f"{ours}/{name}/scale"] = Stored(f"{theirs}.{key}.weight", (hidden,))
        attend = _latent_attention if model.latent else _grouped_attention
        parts = attend(model, f"{theirs}.self_attn")
        found |= {f"{ours}/attention/{name}": stored for name, stored in parts.items()}
        if layer < model.dense_layers:
            found |= _mlp(f"{ours}/mlp", f"{theirs}.mlp", hidden, model.dense_hidden)
            continue
        block_key = f"{theirs}.{block}"
        corrected = f"{block_key}.{correction or f'{router}.e_score_correction_bias'}"
        found |= _router(model, ours, f"{block_key}.{router}", corrected)
        if model.shared_hidden:
            key = f"{block_key}.{shared}"
            found |= _mlp(f"{ours}/shared", key, hidden, model.shared_hidden)
        if model.shared_gate:
            found[f"{ours}/shared_gate/kernel"] = _linear(f"{block_key}.{shared}_gate", hidden, 1)
    return found


def per_expert(
    model: ModelConfig, expert: int, pattern: str, names: tuple[str, str, str]
) -> Iterator[ExpertPart]:
    """The parts of an expert with tensors of its own; `pattern` has {layer}, {expert}, {name}."""
    wide, narrow = model.expert_hidden, model.hidden
    for layer in range(model.moe_layers):
        for matrix, name in enumerate(names):
            key = pattern.format(layer=layer + model.dense_layers, expert=expert, name=name)
            if matrix == DOWN:
                stored = Stored(key, (narrow, wide), transposed)
            else:
                stored = Stored(key, (wide, narrow))
            yield ExpertPart(layer, matrix, stored)


def fused_experts(
    model: ModelConfig, expert: int, pattern: str, *, inputs_first: bool = False
) -> Iterator[ExpertPart]:
    """The parts of an expert where a layer has `gate_up_proj` `[E 2F D]` and `down_proj` `[E D F]`.

    Gate's rows are the first. With `inputs_first` the last two axes are transposed. `pattern` is
    that of single experts.
    """
    experts, wide, narrow = model.experts, model.expert_hidden, model.hidden
    for layer in range(model.moe_layers):
        place = pattern.split("{expert}")[0].format(layer=layer + model.dense_layers)
        both, down = f"{place}gate_up_proj", f"{place}down_proj"
        for matrix, rows in ((GATE, (0, wide)), (UP, (wide, 2 * wide))):
            if inputs_first:
                form = _upper_columns if matrix == UP else _lower_columns
                stored = Stored(both, (experts, narrow, 2 * wide), form, expert)
            else:
                stored = Stored(both, (experts, 2 * wide, narrow), as_stored, expert, rows)
            yield ExpertPart(layer, matrix, stored)
        if inputs_first:
            stored = Stored(down, (experts, wide, narrow), as_stored, expert)
        else:
            stored = Stored(down, (experts, narrow, wide), transposed, expert)
        yield ExpertPart(layer, DOWN, stored)


def _lower_columns(array: np.ndarray) -> np.ndarray:
    return array[:, : array.shape[1] // 2].T


def _upper_columns(array: np.ndarray) -> np.ndarray:
    return array[:, array.shape[1] // 2 :].T


def _linear(key: str, inputs: int, outputs: int) -> Stored:
    return Stored(f"{key}.weight", (outputs, inputs), transposed)


def _mlp(ours: str, theirs: str, hidden: int, width: int) -> dict[str, Stored]:
    return {
        f"{ours}/gate/kernel": _linear(f"{theirs}.gate_proj", hidden, width),
        f"{ours}/up/kernel": _linear(f"{theirs}.up_proj", hidden, width),
        f"{ours}/down/kernel": _linear(f"{theirs}.down_proj", width, hidden),
    }


def _router(model: ModelConfig, ours: str, theirs: str, correction: str) -> dict[str, Stored]:
    found = {f"{ours}/router/kernel": _linear(theirs, model.hidden, model.experts)}
    if model.router.bias:
        found[f"{ours}/router/bias"] = Stored(f"{theirs}.bias", (model.experts,))
    if model.router.correction:
        found[f"{ours}/router_correction"] = Stored(correction, (model.experts,))
    return found


def _grouped_attention(model: ModelConfig, theirs: str) -> dict[str, Stored]:
    hidden = model.hidden
    query, key = model.query_heads * model.head_dim, model.kv_heads * model.head_dim
    widths = {"q_proj": query, "k_proj": key, "v_proj": key}
    found = {f"{n}/kernel": _linear(f"{theirs}.{n}", hidden, width) for n, width in widths.items()}
    found["o_proj/kernel"] = _linear(f"{theirs}.o_proj", query, hidden)
    if model.qkv_bias:
        found |= {f"{n}/bias": Stored(f"{theirs}.{n}.bias", (w,)) for n, w in widths.items()}
    if model.output_bias:
        found["o_proj/bias"] = Stored(f"{theirs}.o_proj.bias", (hidden,))
    if model.qk_norm != "none":
        full = model.qk_norm == "full"
        for name, width in (("q_norm", query), ("k_norm", key)):
            shape = (width if full else model.head_dim,)
            found[f"{name}/scale"] = Stored(f"{theirs}.{name}.weight", shape)
    if model.sinks:
        found["sinks"] = Stored(f"{theirs}.sinks", (model.query_heads,))
    return found


def _latent_attention(model: ModelConfig, theirs: str) -> dict[str, Stored]:
    latent, heads, hidden = model.latent, model.query_heads, model.hidden
    plain, value, rank = latent.plain_channels, latent.value_channels, latent.kv_rank
    query = heads * (plain + latent.rope_channels)
    # One tensor holds keys and values of all heads, each head's key before its value.
    by_head = lambda array: array.reshape(heads, plain + value, rank)
    both = Stored(f"{theirs}.kv_b_proj.weight", (heads * (plain + value), rank))
    found = {
        "kv_down/kernel": _linear(
            f"{theirs}.kv_a_proj_with_mqa", hidden, rank + latent.rope_channels
        ),
        "kv_norm/scale": Stored(f"{theirs}.kv_a_layernorm.weight", (rank,)),
        "key_up": dataclasses.replace(both, form=lambda a: by_head(a)[:, :plain]),
        "value_up": dataclasses.replace(
            both, form=lambda a: by_head(a)[:, plain:].transpose(0, 2, 1)
        ),
        "o_proj/kernel": _linear(f"{theirs}.o_proj", heads * value, hidden),
    }
    if not latent.q_rank:
        return found | {"q_proj/kernel": _linear(f"{theirs}.q_proj", hidden, query)}
    return found | {
        "q_down/kernel": _linear(f"{theirs}.q_a_proj", hidden, latent.q_rank),
        "q_norm/scale": Stored(f"{theirs}.q_a_layernorm.weight", (latent.q_rank,)),
        "q_up/kernel": _linear(f"{theirs}.q_b_proj", latent.q_rank, query),
    }
