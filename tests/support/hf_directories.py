"""Small Hugging Face directories with random weights, written with safetensors; no torch."""

import itertools
import json
import pathlib

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from eep_jax.models.families import registry
from tests.support.hf_tokenizers import CHATML, END, EOS, byte_level, write_tokenizer

QWEN3 = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "head_dim": 16,
    "hidden_act": "silu",
    "hidden_size": 32,
    "moe_intermediate_size": 24,
    "norm_topk_prob": True,
    "num_attention_heads": 4,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "vocab_size": 448,
}


def write_directory(root: pathlib.Path, fields: dict = QWEN3, *, dtype="bfloat16", seed: int = 0):
    """config.json and two shards with their index; returns `root`."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "config.json").write_text(json.dumps(fields))
    model, family = registry.read_model(root), registry.family_of(fields)
    parts = (family.expert(model, e) for e in range(model.experts))
    stored = [*family.dense(model).values(), *(p.stored for p in itertools.chain(*parts))]
    random = np.random.default_rng(seed)
    tensors = {s.key: _values(random, s.key, s.shape, np.dtype(dtype)) for s in stored}
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[::2]}
    shards["model-00002-of-00002.safetensors"] = names[1::2]
    for file, keys in shards.items():
        save_file({key: tensors[key] for key in keys}, root / file)
    where = {key: file for file, keys in shards.items() for key in keys}
    index = {"metadata": {}, "weight_map": where}
    (root / "model.safetensors.index.json").write_text(json.dumps(index))
    return root


def write_chat_model(root: pathlib.Path) -> pathlib.Path:
    """A directory with tokenizer and chat template, as chat models have."""
    write_directory(root)
    inner = byte_level()
    ends = [inner.token_to_id(END), inner.token_to_id(EOS)]
    (root / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    return write_tokenizer(root, inner, chat_template=CHATML, eos_token=END)


def _values(random, key: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    if "norm" in key:
        return np.ones(shape, dtype)
    scale = 1.0 if "embed" in key else shape[-1] ** -0.5
    return (random.standard_normal(shape) * scale).astype(np.float32).astype(dtype)


assert ml_dtypes  # importing it registers the name bfloat16 with numpy
