"""Promises of reading Hugging Face directories: minimal reads, and errors that name the fault."""

import json
import re
import shutil

import ml_dtypes
import numpy as np
import pytest

from eep_jax.errors import CheckpointError
from eep_jax.models.families.quantized import from_fp8, from_mxfp4
from eep_jax.storage.hugging_face import HuggingFaceCheckpoint, is_hugging_face
from tests.support.models import a_model
from tests.support.parity import ROOT
from tests.support.safetensors import load, save

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


@pytest.fixture
def copy_of(tmp_path):
    def copy(name: str):
        return shutil.copytree(ROOT / name, tmp_path / name)

    return copy


def edit(root, change, file: str = "model.safetensors") -> None:
    tensors = load(root / file)
    change(tensors)
    save(root / file, tensors)


def edit_config(root, **changes) -> None:
    values = json.loads((root / "config.json").read_text())
    (root / "config.json").write_text(json.dumps(values | changes))


GATE = "model.layers.1.mlp.experts.5.gate_proj.weight"
NORM = "model.layers.0.input_layernorm.weight"


@pytest.mark.parametrize(("key", "shape"), [(GATE, "[24, 32]"), (NORM, "[32]")])
def test_a_missing_tensor_is_named_with_its_file_and_the_expected_shape(copy_of, key, shape):
    root = copy_of("qwen3_moe")
    edit(root, lambda tensors: tensors.pop(key))
    said = f"{root}/model.safetensors has no tensor {key}, expected one of shape {shape}"
    with pytest.raises(CheckpointError, match=re.escape(said)):
        HuggingFaceCheckpoint(root)


@pytest.mark.parametrize("key", [GATE, NORM])
def test_a_tensor_of_another_shape_is_named_with_both(copy_of, key):
    root = copy_of("qwen3_moe")
    before = load(root / "model.safetensors")[key]
    edit(root, lambda tensors: tensors.update({key: before[:-1]}))
    found, wanted = list(before[:-1].shape), list(before.shape)
    said = f"{root}/model.safetensors: {key} has shape {found}, expected {wanted}"
    with pytest.raises(CheckpointError, match=re.escape(said)):
        HuggingFaceCheckpoint(root)


def test_a_shard_that_is_gone_is_named(copy_of):
    root = copy_of("mixtral")
    (root / "model-00003-of-00007.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lacks \['model-00003-of-00007.safetensors'\]"):
        HuggingFaceCheckpoint(root)


def test_a_tensor_that_the_index_puts_into_the_wrong_shard_is_named(copy_of):
    root = copy_of("mixtral")
    index = json.loads((root / "model.safetensors.index.json").read_text())
    key = "model.layers.0.block_sparse_moe.experts.0.w1.weight"
    index["weight_map"][key] = "model-00007-of-00007.safetensors"
    (root / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=f"00007-of-00007.* has no tensor {key}"):
        HuggingFaceCheckpoint(root)


@pytest.mark.parametrize("keep", [5, 40, 5000, -1])
def test_a_file_that_is_cut_off_is_named(copy_of, keep):
    root = copy_of("olmoe")
    file = root / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=f"{file} is not readable as a safetensors file"):
        HuggingFaceCheckpoint(root)


def test_an_error_for_missing_or_other_weights_names_the_expectation(copy_of, tmp_path):
    root = copy_of("olmoe")
    (root / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"holds no weights: expected .*index.json"):
        HuggingFaceCheckpoint(root)
    with pytest.raises(CheckpointError, match=f"cannot read {tmp_path}/config.json"):
        HuggingFaceCheckpoint(tmp_path)
    assert is_hugging_face(root) and not is_hugging_face(tmp_path)


def test_an_unknown_architecture_lists_the_known_ones(copy_of):
    root = copy_of("olmoe")
    edit_config(root, architectures=["LlamaForCausalLM"])
    with pytest.raises(CheckpointError, match=r"LlamaForCausalLM.*DeepseekV3.*Qwen3MoeForCausalLM"):
        HuggingFaceCheckpoint(root)


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("qwen3_moe", "decoder_sparse_step", 2),
        ("qwen3_moe", "mlp_only_layers", [1]),
        ("qwen3_moe", "hidden_act", "gelu"),
        ("qwen2_moe", "use_sliding_window", True),
        ("olmoe", "clip_qkv", 8.0),
        ("deepseek_v2", "topk_method", "noaux_tc"),
        ("deepseek_v3", "scoring_func", "softmax"),
        ("deepseek_v3", "moe_layer_freq", 2),
        ("gpt_oss", "layer_types", ["full_attention"]),
        ("mixtral", "num_local_experts", "8"),
        ("mixtral", "quantization_config", {"quant_method": "awq"}),
        ("mixtral", "num_key_value_heads", 3),
    ],
)
def test_a_value_that_is_not_supported_is_named_with_its_field(copy_of, name, field, value):
    root = copy_of(name)
    edit_config(root, **{field: value})
    shown = "kv_heads=3" if field == "num_key_value_heads" else f"{field}={value!r}"
    with pytest.raises(CheckpointError, match=f"{root}/config.json.*{re.escape(shown)}"):
        HuggingFaceCheckpoint(root)


def test_a_rope_that_is_not_implemented_is_named(copy_of):
    root = copy_of("qwen3_moe")
    edit_config(root, rope_parameters={"rope_type": "longrope", "factor": 8.0})
    with pytest.raises(CheckpointError, match="rope_parameters: rope_type='longrope'"):
        HuggingFaceCheckpoint(root)


def test_older_files_have_rope_in_two_fields(copy_of):
    root = copy_of("deepseek_v3")
    values = json.loads((root / "config.json").read_text())
    rope = values["rope_parameters"]
    theta, kind = rope.pop("rope_theta"), rope.pop("rope_type")
    older = {"rope_parameters": None, "rope_theta": theta, "rope_scaling": rope | {"type": kind}}
    wanted = HuggingFaceCheckpoint(root).model
    edit_config(root, **older)
    assert HuggingFaceCheckpoint(root).model == wanted


def test_ends_of_the_generation_config_end_completions(copy_of):
    root = copy_of("gpt_oss")
    (root / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9, 11]}))
    model = HuggingFaceCheckpoint(root).model
    assert model.end_tokens == {7, 9, 11}
    edit_config(root, eos_token_id=[3, 9])
    assert HuggingFaceCheckpoint(root).model.end_tokens == {3, 7, 9, 11}


@pytest.mark.parametrize("dtype", ["", "bfloat16"])
def test_experts_equal_the_files_in_the_requested_dtype(dtype):
    checkpoint = HuggingFaceCheckpoint(ROOT / "qwen3_moe", dtype)
    tensors = load(ROOT / "qwen3_moe" / "model.safetensors")
    assert checkpoint.manifest["dtype"] == (dtype or "float32")
    expert = checkpoint.read_experts([5])[5]
    for layer in range(2):
        prefix = f"model.layers.{layer}.mlp.experts.5."
        wanted = [tensors[f"{prefix}{name}_proj.weight"] for name in ("gate", "up", "down")]
        wanted[2] = wanted[2].T
        np.testing.assert_array_equal(expert[layer], np.stack(wanted).astype(expert.dtype))
    assert checkpoint.dtype == expert.dtype == np.dtype(dtype or "float32")


def test_only_the_tensors_of_the_named_expert_are_touched(copy_of):
    root = copy_of("mixtral")
    checkpoint = HuggingFaceCheckpoint(root)
    touched, span = [], checkpoint._files.span
    checkpoint._files.span = lambda key, *rest: touched.append(key) or span(key, *rest)
    checkpoint.read_experts([3])
    assert len(touched) == 6 and all(".experts.3." in key for key in touched)


def test_another_model_is_refused_but_not_for_its_name():
    checkpoint = HuggingFaceCheckpoint(ROOT / "olmoe")
    checkpoint.require_model(HuggingFaceCheckpoint(ROOT / "olmoe").model)
    with pytest.raises(CheckpointError, match="vocab_size': '96 instead of 64'"):
        checkpoint.require_model(a_model())


def as_fp8(tensors: dict, block: int = 16) -> dict:
    """Makes the layers' matrices float8 with a scale per block; returns the dequantized values."""
    truth = {}
    for key in [k for k in tensors if re.search(r"layers\.\d+\.(mlp|self_attn).*proj\.weight", k)]:
        weight = tensors[key]
        rows, columns = (-(-size // block) for size in weight.shape)
        scales = np.random.default_rng(len(key)).uniform(0.01, 0.03, (rows, columns))
        scales = scales.astype(np.float32)
        spread = np.kron(scales, np.ones((block, block), np.float32))
        spread = spread[: weight.shape[0], : weight.shape[1]]
        tensors[key] = (weight / spread).astype(ml_dtypes.float8_e4m3fn)
        tensors[f"{key}_scale_inv"] = scales
        truth[key] = (tensors[key].astype(np.float32) * spread).astype(BFLOAT16)
    return truth


def test_fp8_blocks_become_bfloat16(copy_of):
    root, truth = copy_of("deepseek_v3"), {}
    edit(root, lambda tensors: truth.update(as_fp8(tensors)))
    scheme = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    edit_config(root, quantization_config=scheme)
    checkpoint = HuggingFaceCheckpoint(root)
    assert checkpoint.dtype == BFLOAT16
    down = truth["model.layers.1.mlp.experts.4.down_proj.weight"]
    np.testing.assert_array_equal(checkpoint.read_experts([4])[4][0, 2], down.T)
    output = checkpoint.read_dense()["layers/0/attention/o_proj/kernel"]
    np.testing.assert_array_equal(output, truth["model.layers.0.self_attn.o_proj.weight"].T)


def test_weights_without_their_scales_are_named(copy_of):
    root = copy_of("deepseek_v3")
    edit(root, as_fp8)
    with pytest.raises(CheckpointError, match=r"layers\.0.*proj\.weight is float8_e4m3fn without"):
        HuggingFaceCheckpoint(root)


def test_fp8_values_times_scales():
    weight = np.array([[1, 2, 4], [0.5, -1, 8]], ml_dtypes.float8_e4m3fn)
    scales = np.array([[2, 10]], np.float32)
    wanted = [[2, 4, 40], [1, -2, 80]]
    assert from_fp8(weight, scales, (128, 2)).astype(np.float32).tolist() == wanted


def test_mxfp4_values_times_powers_of_two():
    blocks = np.zeros((1, 1, 16), np.uint8)
    blocks[0, 0, :3] = [0x21, 0xF7, 0x08]  # the low half is first
    found = from_mxfp4(blocks, np.array([[128]], np.uint8)).astype(np.float32)
    assert found.shape == (1, 32) and found[0, :6].tolist() == [1, 2, 12, -12, 0, 0]


def test_mxfp4_experts_are_those_of_the_values_they_stand_for(copy_of):
    """The same model twice: in four bits, and as float32 of the same values."""
    narrow = copy_of("gpt_oss")
    random, plain = np.random.default_rng(3), {}

    def pack(tensors: dict) -> None:
        for key in [k for k in tensors if k.endswith(("gate_up_proj", "down_proj"))]:
            experts, inputs, outputs = tensors.pop(key).shape
            blocks = random.integers(0, 256, (experts, outputs, inputs // 32, 16), np.uint8)
            scales = random.integers(118, 124, blocks.shape[:3]).astype(np.uint8)
            tensors[f"{key}_blocks"], tensors[f"{key}_scales"] = blocks, scales
            values = [from_mxfp4(b, s).T for b, s in zip(blocks, scales, strict=True)]
            plain[key] = np.stack(values).astype(np.float32)

    edit_config(narrow, intermediate_size=64, quantization_config={"quant_method": "mxfp4"})
    edit(narrow, widen_gpt_oss)
    edit(narrow, pack)
    found = HuggingFaceCheckpoint(narrow).read_experts([6])[6]
    edit_config(narrow, quantization_config=None)
    edit(narrow, lambda tensors: tensors.update(plain))
    wanted = HuggingFaceCheckpoint(narrow, "bfloat16").read_experts([6])[6]
    assert found.dtype == BFLOAT16
    np.testing.assert_array_equal(found, wanted)


def widen_gpt_oss(tensors: dict) -> None:
    """MXFP4 needs channels in blocks of 32: F becomes 64."""
    for key in [k for k in tensors if "experts" in k]:
        shape = list(tensors[key].shape)
        axis = {"gate_up_proj": 2, "gate_up_proj_bias": 1, "down_proj": 1}.get(key.split(".")[-1])
        if axis is not None:
            shape[axis] = 128 if "gate_up" in key else 64
            tensors[key] = np.resize(tensors[key], shape)
