"""Writes tiny random checkpoints of every family, and the logits that transformers has for them.

    python -m tests.eep_jax.models.make_parity --out=tests/eep_jax/models/parity

Needs torch (CPU), transformers and compressed-tensors, which the project itself does not. The files
beside this one were made so; `test_parity.py` compares with them, and with torch at hand makes them
anew.

A checkpoint is written by `save_pretrained`, in shards for one family. `expected.npz` holds the
prompt `[T]`, the logits of its positions `[T V]`, the tokens that greedy decoding goes on with
`[N]`, and the logits of those N steps `[N V]`, computed with a KV cache in float32.

`transformers.json` holds the default fields of each family's configuration class, and the
frequencies that some configurations of RoPE have, and the tensors of each family as transformers 5
converts them.
"""

import argparse
import itertools
import json
import pathlib
import tempfile

import numpy as np

PROMPT_TOKENS, STEPS = 12, 32
GAP_MIN = 0.01  # between the best two logits, so that rounding changes no token
EXPECTED = "expected.npz"
SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": None,
    "pad_token_id": None,
}
EXPERTS = {"intermediate_size": 40, "moe_intermediate_size": 24, "num_experts": 8}
LATENT = {
    "num_key_value_heads": 4,
    "intermediate_size": 40,
    "moe_intermediate_size": 24,
    "n_routed_experts": 8,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 12,
    "v_head_dim": 10,
    "first_k_dense_replace": 1,
}
# Of the newer families: nothing fits anything else.
ODD = {
    "hidden_size": 36,
    "num_attention_heads": 6,
    "num_key_value_heads": 1,
    "num_experts_per_tok": 5,
    "intermediate_size": 28,
    "moe_intermediate_size": 20,
}
VISION = {"hidden_size": 8, "intermediate_size": 8, "patch_size": 2}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 4.0,
    "beta_slow": 1.0,
}
# Class of the configuration, and what differs from the sizes above.
FAMILIES = {
    "qwen3_moe": (
        "Qwen3MoeConfig",
        EXPERTS
        | {"head_dim": 12, "norm_topk_prob": True, "tie_word_embeddings": True}
        | {"attention_bias": True},
    ),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        EXPERTS | {"shared_expert_intermediate_size": 20, "num_key_value_heads": 4},
    ),
    "mixtral": (
        "MixtralConfig",
        {"intermediate_size": 40, "num_local_experts": 8, "sliding_window": 9},
    ),
    "olmoe": ("OlmoeConfig", {"intermediate_size": 24, "num_experts": 8}),
    "deepseek_v2": (
        "DeepseekV2Config",
        LATENT
        | {"q_lora_rank": 20, "n_shared_experts": 2, "topk_method": "group_limited_greedy"}
        | {"n_group": 4, "topk_group": 2, "num_experts_per_tok": 3, "routed_scaling_factor": 1.5},
    ),
    "deepseek_v2_lite": (
        "DeepseekV2Config",
        LATENT
        | {"q_lora_rank": None, "n_shared_experts": 1, "topk_method": "greedy"}
        | {"n_group": 1, "topk_group": 1}
        | {"rope_parameters": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707}},
    ),
    "deepseek_v3": (
        "DeepseekV3Config",
        LATENT
        | {"q_lora_rank": 20, "n_shared_experts": 1, "n_group": 4, "topk_group": 2}
        | {"num_experts_per_tok": 3, "num_mtp_layers": 0}
        | {"rope_parameters": YARN | {"mscale": 0.8, "mscale_all_dim": 1.0}},
    ),
    "gpt_oss": (
        "GptOssConfig",
        {"intermediate_size": 40, "num_local_experts": 8, "head_dim": 8, "sliding_window": 8}
        | {"rope_parameters": YARN | {"truncate": False}, "num_hidden_layers": 2},
    ),
    "glm4_moe": (
        "Glm4MoeConfig",
        ODD
        | {"n_routed_experts": 24, "first_k_dense_replace": 2, "num_hidden_layers": 3}
        | {"head_dim": 12, "use_qk_norm": True, "attention_bias": True, "num_mtp_layers": 0}
        | {"routed_scaling_factor": 2.5},
    ),
    "glm4_moe_air": (
        "Glm4MoeConfig",
        ODD
        | {"n_routed_experts": 12, "first_k_dense_replace": 0, "n_group": 3, "topk_group": 2}
        | {"head_dim": 8, "num_mtp_layers": 0, "tie_word_embeddings": True}
        | {"num_experts_per_tok": 3},
    ),
    "glm4_moe_lite": (
        "Glm4MoeLiteConfig",
        LATENT
        | {"hidden_size": 36, "n_routed_experts": 10, "num_experts_per_tok": 3, "q_lora_rank": 20}
        | {"mlp_layer_types": ["dense", "sparse"], "n_shared_experts": 1},
    ),
    "minimax_m2": (
        "MiniMaxM2Config",
        ODD | {"num_local_experts": 24, "intermediate_size": 20, "head_dim": 10, "rotary_dim": 6},
    ),
    "hy_v3": (
        "HYV3Config",
        ODD
        | {"num_experts": 10, "head_dim": 10, "mlp_layer_types": ["dense", "sparse"]}
        | {"num_shared_experts": 2, "num_experts_per_tok": 3},
    ),
    "dots1": (
        "Dots1Config",
        ODD
        | {"n_routed_experts": 10, "head_dim": 10, "n_shared_experts": 1, "num_experts_per_tok": 3}
        | {"sliding_window": 7, "max_window_layers": 1, "norm_topk_prob": True}
        | {"routed_scaling_factor": 1.5},
    ),
    "ernie4_5_moe": (
        "Ernie4_5_MoeConfig",
        ODD
        | {"moe_num_experts": 10, "moe_k": 3, "moe_num_shared_experts": 2, "num_hidden_layers": 3}
        | {"num_attention_heads": 3},
    ),
    "qwen3_vl_moe": (
        "Qwen3VLMoeConfig",
        {
            "text_config": SIZES
            | ODD
            | {"num_experts": 10, "head_dim": 10, "num_experts_per_tok": 3, "norm_topk_prob": True}
            | {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 2, 1]}},
            "vision_config": VISION
            | {"depth": 1, "num_heads": 1, "out_hidden_size": 36, "deepstack_visual_indexes": [0]}
            | {"num_position_embeddings": 4, "in_channels": 1, "temporal_patch_size": 1},
            "tie_word_embeddings": False,
        },
    ),
    "glm4v_moe": (
        "Glm4vMoeConfig",
        {
            "text_config": SIZES
            | ODD
            | {"n_routed_experts": 10, "head_dim": 12, "num_experts_per_tok": 3}
            | {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 1]}},
            "vision_config": VISION
            | {"depth": 1, "num_heads": 1, "out_hidden_size": 36, "image_size": 4}
            | {"in_channels": 1, "temporal_patch_size": 1},
            "tie_word_embeddings": False,
        },
    ),
    "kimi_k25": (
        "Kimi_K25Config",
        {
            "text_config": SIZES
            | LATENT
            | {"model_type": "deepseek_v3", "q_lora_rank": 20, "n_group": 1, "topk_group": 1}
            | {"num_experts_per_tok": 3, "num_mtp_layers": 0}
            | {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}},
            "vision_config": VISION
            | {"num_hidden_layers": 1, "num_attention_heads": 1, "pos_emb_height": 2}
            | {"pos_emb_width": 2, "pos_emb_time": 1},
            "projection_hidden_size": 8,
            "tie_word_embeddings": False,
        },
    ),
}
MULTIMODAL = ("qwen3_vl_moe", "glm4v_moe", "kimi_k25")
SHARDED = "mixtral"
# Corrections that leave all choices below zero.
FAR_BELOW_ZERO = ("glm4_moe", "minimax_m2")
FACTS = "transformers.json"
_INT, _FLOAT = {"type": "int", "symmetric": True}, {"type": "float", "num_bits": 8}
COMPRESSED = (
    ("pack-quantized", _INT | {"num_bits": 4, "strategy": "group", "group_size": 12}),
    ("pack-quantized", _INT | {"num_bits": 4, "strategy": "channel"}),
    ("pack-quantized", _INT | {"num_bits": 8, "strategy": "channel"}),
    ("float-quantized", _FLOAT | {"strategy": "channel"}),
    ("float-quantized", _FLOAT | {"strategy": "tensor"}),
    ("float-quantized", _FLOAT | {"strategy": "block", "block_structure": [4, 24]}),
)
_STRETCH = {"factor": 4.0, "original_max_position_embeddings": 32}
ROPES = (
    {"rope_type": "linear", "factor": 3.0},
    {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0} | _STRETCH,
    {"rope_type": "llama3", "low_freq_factor": 1.5, "high_freq_factor": 2.0} | _STRETCH,
    {"rope_type": "yarn"} | _STRETCH,
    {"rope_type": "yarn", "factor": 4.0},
    {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 32},
    {"rope_type": "yarn", "mscale": 0.8, "mscale_all_dim": 1.2} | _STRETCH,
    {"rope_type": "yarn", "attention_factor": 1.25, "truncate": False} | _STRETCH,
    {"rope_type": "yarn", "beta_fast": 1.0, "beta_slow": 1.0} | _STRETCH,
    {"rope_type": "yarn", "beta_fast": 2.0, "beta_slow": 2.0, "truncate": False} | _STRETCH,
    {"rope_type": "dynamic", "factor": 2.0},
    {"rope_type": "yarn", "partial_rotary_factor": 0.5} | _STRETCH,
)


def make_all(out: pathlib.Path) -> None:
    """Writes every family under `out`, a directory of its own each."""
    (out / FACTS).write_text(json.dumps(facts(), indent=1, sort_keys=True) + "\n")
    for name in FAMILIES:
        make_one(name, out / name)


def facts() -> dict:
    """What transformers says of configurations alone."""
    import transformers
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    defaults, ropes = {}, []
    for class_name in sorted({c for name, (c, _) in FAMILIES.items() if name not in MULTIMODAL}):
        fields = getattr(transformers, class_name)().to_dict()
        architecture = class_name.replace("Config", "ForCausalLM")
        defaults[architecture] = fields | {"architectures": [architecture]}
    for class_name in ("Qwen3VLMoeConfig", "Glm4vMoeConfig"):
        whole = getattr(transformers, class_name)()
        architecture = class_name.replace("Config", "ForConditionalGeneration")
        defaults[architecture] = whole.text_config.to_dict() | {
            "architectures": [architecture],
            "tie_word_embeddings": whole.tie_word_embeddings,
        }
    for parameters in ROPES:
        fields = {"head_dim": 24, "max_position_embeddings": 96}
        fields["rope_parameters"] = {"rope_theta": 500.0} | parameters
        config = transformers.Glm4MoeConfig(**json.loads(json.dumps(fields)))
        if parameters.get("partial_rotary_factor") is None:
            config.rope_parameters["partial_rotary_factor"] = 1.0
        found, amplitude = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config)
        fields["rope_parameters"].setdefault("partial_rotary_factor", 1.0)
        ropes.append(fields | {"frequencies": found.tolist(), "amplitude": float(amplitude)})
    return {
        "transformers": transformers.__version__,
        "defaults": defaults,
        "ropes": ropes,
        "compressed": [_compressed(format_, weights) for format_, weights in COMPRESSED],
        "converted": {name: _converted(name) for name in FAMILIES if name not in MULTIMODAL},
    }


def _compressed(format_: str, weights: dict) -> dict:
    """A matrix `[6 36]` as compressed-tensors stores it, and what it makes of that again."""
    import torch
    from compressed_tensors.compressors.naive_quantized.base import NaiveQuantizationCompressor
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights))
    packed = format_ == "pack-quantized"
    compressor = PackedQuantizationCompressor if packed else NaiveQuantizationCompressor
    generator = torch.Generator().manual_seed(1)
    matrix = torch.randn(6, 36, generator=generator).bfloat16()
    groups = {"group": (6, 3), "channel": (6, 1), "tensor": (1,), "block": (2, 2)}
    scale = (0.2 + torch.rand(groups[weights["strategy"]], generator=generator)).bfloat16()
    state = compressor.compress({"weight": matrix, "weight_scale": scale}, scheme)
    values = compressor.decompress(dict(state), scheme)["weight"]
    state = {key: value for key, value in state.items() if key != "weight_shape"}
    dtypes = {key: str(value.dtype).split(".")[-1] for key, value in state.items()}
    return {
        "format": format_,
        "weights": weights,
        "stored": {key: value.double().tolist() for key, value in state.items()},
        "dtypes": dtypes,
        "values": values.double().tolist(),
    }


def _converted(name: str) -> dict[str, list[int]]:
    """Shapes of the tensors that transformers 5 writes in its own form, by key."""
    from safetensors import safe_open

    with tempfile.TemporaryDirectory() as directory:
        _model(name).save_pretrained(directory, save_original_format=False)
        with safe_open(pathlib.Path(directory) / "model.safetensors", "numpy") as file:
            return {key: file.get_slice(key).get_shape() for key in sorted(file.keys())}


def make_one(name: str, directory: pathlib.Path) -> None:
    """Writes one family's checkpoint and what is expected of it."""
    import torch
    import transformers

    model = _model(name)
    for seed in itertools.count():
        _draw(model, seed, correction=-4.0 if name in FAR_BELOW_ZERO else 0.0)
        expected = _expected(model, seed)
        if _smallest_gap(expected) > GAP_MIN:
            break
    shard = "60KB" if name == SHARDED else "100MB"
    model.save_pretrained(directory, max_shard_size=shard)
    (directory / "generation_config.json").unlink(missing_ok=True)
    if name == "kimi_k25":
        _name_layers(directory / "model.safetensors")
    np.savez_compressed(directory / EXPECTED, **expected)
    facts = {"transformers": transformers.__version__, "torch": torch.__version__}
    (directory / "made_with.json").write_text(json.dumps(facts) + "\n")


def _model(name: str):
    import torch
    import transformers

    class_name, changes = FAMILIES[name]
    multimodal = name in MULTIMODAL
    config = getattr(transformers, class_name)(**changes if multimodal else SIZES | changes)
    kind = "AutoModelForImageTextToText" if multimodal else "AutoModelForCausalLM"
    options = {"dtype": torch.float32, "attn_implementation": "eager"}
    return getattr(transformers, kind).from_config(config, **options).eval()


def _name_layers(path: pathlib.Path) -> None:
    """transformers 5.24 writes `blocks` for the text's layers too; Kimi's files have `layers`."""
    from safetensors.torch import load_file, save_file

    there = "language_model.model.blocks."
    tensors = load_file(path)
    save_file(
        {k.replace(there, there.replace("blocks", "layers")): v for k, v in tensors.items()}, path
    )


def _draw(model, seed: int, correction: float) -> None:
    """Weights of a size at which every part matters: no two experts or tokens are nearly alike."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    normal = lambda like: torch.randn(like.shape, generator=generator, dtype=torch.float32)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "inv_freq" in name:
                continue
            if "norm" in name:
                tensor.copy_(1 + 0.2 * normal(tensor))
            elif name.endswith("correction_bias"):
                tensor.copy_(correction + 0.3 * normal(tensor))
            elif name.endswith(("bias", "sinks")):
                tensor.copy_(0.3 * normal(tensor))
            elif "embed" in name:
                # A tied head gives every token its own embedding back: then the rest must outweigh.
                tensor.copy_(normal(tensor) * (0.15 if model.config.tie_word_embeddings else 1))
            else:
                fused_of_gpt_oss = name.endswith(("experts.gate_up_proj", "experts.down_proj"))
                inputs = tensor.shape[-2 if fused_of_gpt_oss and "GptOss" in repr(model) else -1]
                tensor.copy_(normal(tensor) * 1.5 * inputs**-0.5)


def _expected(model, seed: int) -> dict[str, np.ndarray]:
    import torch

    generator = torch.Generator().manual_seed(seed)
    # As the byte tokenizer makes prompts: BOS, then ASCII.
    prompt = torch.randint(1, SIZES["vocab_size"], (1, PROMPT_TOKENS), generator=generator)
    prompt[0, 0] = SIZES["bos_token_id"]
    with torch.no_grad():
        found = model(prompt, use_cache=True)
        prefill, logits, tokens, cache = found.logits[0], [], [], found.past_key_values
        token = prefill[-1].argmax()
        for _ in range(STEPS):
            tokens.append(int(token))
            found = model(token.reshape(1, 1), past_key_values=cache, use_cache=True)
            logits.append(found.logits[0, -1])
            token = logits[-1].argmax()
    return {
        "prompt": prompt[0].numpy().astype(np.int32),
        "prefill": prefill.numpy(),
        "tokens": np.asarray(tokens, np.int32),
        "decode": torch.stack(logits).numpy(),
    }


def _smallest_gap(expected: dict[str, np.ndarray]) -> float:
    logits = np.concatenate([expected["prefill"][-1:], expected["decode"]])
    best = np.sort(logits, axis=-1)
    return float((best[:, -1] - best[:, -2]).min())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    make_all(parser.parse_args().out)
