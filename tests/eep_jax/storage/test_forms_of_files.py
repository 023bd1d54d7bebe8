"""Promise: a model is the same in every form in which its files come."""

import json
import re

import ml_dtypes
import numpy as np
import pytest

from eep_jax.errors import CheckpointError
from eep_jax.models.families.quantized import BFLOAT16, quantization_of
from eep_jax.models.families.registry import text_part
from eep_jax.models.families.tensors import Stored
from eep_jax.storage.blocks import Files, ScratchBuffer
from eep_jax.storage.hugging_face import HuggingFaceCheckpoint
from eep_jax.storage.safetensors_files import SafetensorsFiles
from eep_jax.storage.stored_tensors import StoredTensors
from tests.eep_jax.models.make_parity import FACTS
from tests.support.parity import ROOT
from tests.support.safetensors import load, save

TRANSFORMERS = json.loads((ROOT / FACTS).read_text())
CONVERTED: dict[str, dict[str, list[int]]] = TRANSFORMERS["converted"]
ONE_FILE = "model.safetensors"
# What transformers 5 has in place of parts of the families' own keys.
NEWER = {
    ".block_sparse_moe.": ".mlp.",
    ".mlp.router.gate.": ".mlp.gate.",
    ".mlp.expert_bias": ".mlp.e_score_correction_bias",
    ".mlp.shared_mlp.": ".mlp.shared_experts.",
    ".mlp.moe_statics.": ".mlp.gate.moe_statics.",
}
EXPERT = re.compile(r"(.*experts)\.(\d+)\.(\w+)\.weight")
GATES, UPS = ("gate_proj", "w1"), ("up_proj", "w3")


def tensors_of(name: str) -> dict[str, np.ndarray]:
    found = {}
    for path in sorted((ROOT / name).glob("*.safetensors")):
        found |= load(path)
    return found


def fused(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Experts of a layer in two tensors, gate's rows before up's; the others as they are."""
    found, experts = {}, {}
    for key, value in tensors.items():
        if match := EXPERT.fullmatch(key):
            experts.setdefault(match[1], {})[int(match[2]), match[3]] = value
        else:
            found[key] = value
    for place, parts in experts.items():
        count = 1 + max(expert for expert, _ in parts)
        of = lambda names, parts=parts, count=count: np.stack(
            [next(parts[e, n] for n in names if (e, n) in parts) for e in range(count)]
        )
        found[f"{place}.gate_up_proj"] = np.concatenate([of(GATES), of(UPS)], axis=1)
        found[f"{place}.down_proj"] = of(("down_proj", "w2"))
    return found


def renamed(tensors: dict[str, np.ndarray], names: dict[str, str]) -> dict[str, np.ndarray]:
    found = {}
    for key, value in tensors.items():
        for old, new in names.items():
            key = key.replace(old, new)
        found[key] = value
    return found


def write(root, name: str, tensors: dict[str, np.ndarray], **changes) -> HuggingFaceCheckpoint:
    """A directory with the config.json of a parity checkpoint, and these tensors."""
    root.mkdir(exist_ok=True)
    values = json.loads((ROOT / name / "config.json").read_text())
    (root / "config.json").write_text(json.dumps(values | changes))
    save(root / ONE_FILE, tensors)
    return HuggingFaceCheckpoint(root)


def assert_same(found: HuggingFaceCheckpoint, name: str) -> None:
    """All weights and sizes are those of the parity checkpoint."""
    wanted = HuggingFaceCheckpoint(ROOT / name)
    found.require_model(wanted.model)
    experts = list(range(wanted.model.experts))
    read, kept = found.read_experts(experts), wanted.read_experts(experts)
    for expert in experts:
        np.testing.assert_array_equal(read[expert], kept[expert], err_msg=f"expert {expert}")
    for key, value in wanted.read_dense().items():
        np.testing.assert_array_equal(found.read_dense()[key], value, err_msg=key)


@pytest.mark.parametrize("name", sorted(CONVERTED))
def test_files_that_transformers_5_converts_hold_the_same_model(tmp_path, name):
    tensors = tensors_of(name)
    if name != "gpt_oss":
        tensors = renamed(fused(tensors), NEWER)
    assert {key: list(value.shape) for key, value in tensors.items()} == CONVERTED[name]
    assert_same(write(tmp_path, name, tensors), name)


@pytest.mark.parametrize("beginning", ["model.language_model.", "language_model.model."])
def test_a_text_part_has_its_keys_behind_a_prefix(tmp_path, beginning):
    head = "lm_head" if beginning.startswith("model") else "language_model.lm_head"
    tensors = renamed(tensors_of("deepseek_v3"), {"model.": beginning, "lm_head": head})
    tensors |= {"vision_tower.conv.weight": np.ones((2, 2), np.float32)}
    assert_same(write(tmp_path, "deepseek_v3", tensors), "deepseek_v3")


@pytest.mark.parametrize("name", ["qwen3_vl_moe", "glm4v_moe", "kimi_k25"])
def test_of_a_multimodal_model_the_text_part_is_read(name):
    """Their logits are compared with transformers' in test_parity.py."""
    checkpoint = HuggingFaceCheckpoint(ROOT / name)
    vision = [key for key in tensors_of(name) if "vis" in key]
    assert vision and not checkpoint.model.tied_embeddings
    files = {path: path.read_bytes() for path in checkpoint.source_files()}
    spans = [*checkpoint.dense_spans(), *checkpoint.spans(3)]
    assert all(end <= len(files[path]) for path, _, end in spans)


@pytest.mark.parametrize(
    ("architecture", "outside", "inside", "tied"),
    [
        ("Qwen3VLMoeForConditionalGeneration", None, True, False),
        ("Qwen3VLMoeForConditionalGeneration", True, False, True),
        ("Glm4vMoeForConditionalGeneration", None, True, True),
        ("Glm4vMoeForConditionalGeneration", False, False, False),
        ("KimiK25ForConditionalGeneration", False, True, False),
    ],
)
def test_whether_a_text_part_is_tied_is_said_outside_it(architecture, outside, inside, tied):
    values = {"architectures": [architecture], "text_config": {"tie_word_embeddings": inside}}
    assert text_part(values | {"tie_word_embeddings": outside})["tie_word_embeddings"] is tied


def test_a_text_part_that_is_not_there_is_named():
    values = {"architectures": ["KimiK25ForConditionalGeneration"], "eos_token_id": 7}
    with pytest.raises(CheckpointError, match="text_config=None must be an object"):
        text_part(values)
    with pytest.raises(CheckpointError, match="has no tie_word_embeddings beside text_config"):
        text_part(values | {"text_config": {}})
    found = text_part(values | {"text_config": {}, "tie_word_embeddings": False})
    assert found["eos_token_id"] == 7 and found["architectures"] == ["DeepseekV3ForCausalLM"]


def test_experts_with_their_inputs_first_are_those_of_releases_of_qwen3_vl(tmp_path):
    tensors = tensors_of("qwen3_vl_moe")
    for key in [key for key in tensors if ".experts." in key]:
        tensors[key] = tensors[key].transpose(0, 2, 1)
    assert_same(write(tmp_path, "qwen3_vl_moe", tensors), "qwen3_vl_moe")


def test_a_fused_tensor_of_another_shape_is_named(tmp_path):
    tensors = fused(tensors_of("qwen3_moe"))
    key = "model.layers.1.mlp.experts.gate_up_proj"
    with pytest.raises(CheckpointError, match=rf"{key} has shape \[8, 47, 32\], expected \[8, 48"):
        write(tmp_path, "qwen3_moe", tensors | {key: tensors[key][:, 1:]})
    with pytest.raises(CheckpointError, match=rf"has no tensor {key}"):
        write(tmp_path, "qwen3_moe", {k: v for k, v in tensors.items() if k != key})


def test_of_a_fused_tensor_only_one_experts_bytes_are_read(tmp_path):
    checkpoint = write(tmp_path, "olmoe", fused(tensors_of("olmoe")))
    read = sum(end - start for _, start, end in checkpoint.spans(5))
    assert read == checkpoint.read_experts([5])[5].nbytes


def test_fused_fp8_blocks_become_bfloat16(tmp_path):
    tensors = fused(tensors_of("qwen3_moe"))
    expected = {}
    for key in [key for key in tensors if ".experts." in key]:
        experts, rows, columns = tensors[key].shape
        shape = experts, -(-rows // 16), -(-columns // 16)
        scales = np.random.default_rng(1).uniform(0.01, 0.03, shape).astype(np.float32)
        spread = np.kron(scales, np.ones((1, 16, 16), np.float32))[:, :rows, :columns]
        tensors[key] = (tensors[key] / spread).astype(ml_dtypes.float8_e4m3fn)
        tensors[f"{key}_scale_inv"] = scales
        expected[key] = (tensors[key].astype(np.float32) * spread).astype(BFLOAT16)
    scheme = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    checkpoint = write(tmp_path, "qwen3_moe", tensors, quantization_config=scheme)
    expert = checkpoint.read_experts([6])[6]
    both = expected["model.layers.1.mlp.experts.gate_up_proj"][6]
    np.testing.assert_array_equal(expert[1, 0], both[:24])
    np.testing.assert_array_equal(expert[1, 1], both[24:])
    down = expected["model.layers.1.mlp.experts.down_proj"][6]
    np.testing.assert_array_equal(expert[1, 2], down.T)


COMPRESSED = TRANSFORMERS["compressed"]
NUMPY = {"bfloat16": BFLOAT16, "int32": np.int32, "float8_e4m3fn": ml_dtypes.float8_e4m3fn}
MATRIX = Stored("x.weight", (6, 36))


def scheme(case: dict, **changes) -> dict:
    group = {"targets": ["Linear"], "weights": case["weights"] | changes}
    return {
        "quant_method": "compressed-tensors",
        "format": case["format"],
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


class TestCompressedTensors:
    """The matrices are those that the library itself wrote, and read again."""

    def stored(self, case: dict) -> dict[str, np.ndarray]:
        values = case["stored"].items()
        return {f"x.{k}": np.array(v).astype(NUMPY[case["dtypes"][k]]) for k, v in values}

    def open(self, root, case: dict, tensors=None, **changes) -> StoredTensors:
        save(root / ONE_FILE, self.stored(case) if tensors is None else tensors)
        values = {"quantization_config": scheme(case, **changes)}
        return StoredTensors(SafetensorsFiles(root), quantization_of(values, "config.json"))

    @pytest.mark.parametrize("case", COMPRESSED, ids=lambda case: str(case["weights"]))
    def test_values_are_those_of_the_library(self, tmp_path, case):
        tensors = self.open(tmp_path, case)
        tensors.check(MATRIX)
        found = tensors.read(MATRIX, Files(), ScratchBuffer())
        assert found.dtype == BFLOAT16
        np.testing.assert_array_equal(found.astype(np.float64), case["values"])

    @pytest.mark.parametrize("case", COMPRESSED, ids=lambda case: str(case["weights"]))
    def test_scales_that_are_missing_or_of_another_shape_are_named(self, tmp_path, case):
        stored = self.stored(case)
        scale = stored.pop("x.weight_scale")
        with pytest.raises(CheckpointError, match=r"x\.weight"):
            self.open(tmp_path, case, stored).check(MATRIX)
        wrong = stored | {"x.weight_scale": np.stack([scale] * 2)}
        with pytest.raises(CheckpointError, match=r"x\.weight_scale has shape"):
            self.open(tmp_path, case, wrong).check(MATRIX)

    @pytest.mark.parametrize(
        "changes",
        [
            {"symmetric": False},
            {"actorder": "group"},
            {"num_bits": 3},
            {"strategy": "tensor_group"},
            {"type": "float"},
        ],
        ids=str,
    )
    def test_what_is_not_supported_is_named(self, tmp_path, changes):
        (name, value), *_ = changes.items()
        with pytest.raises(CheckpointError, match=f"'{name}': {value!r}.* is not supported"):
            self.open(tmp_path, COMPRESSED[0], **changes)

    def test_schemes_that_differ_are_refused(self):
        both = scheme(COMPRESSED[0])
        both["config_groups"]["group_1"] = {"weights": COMPRESSED[1]["weights"]}
        with pytest.raises(CheckpointError, match="is not supported"):
            quantization_of({"quantization_config": both}, "config.json")


def test_experts_of_four_bits_beside_plain_weights_are_served(tmp_path):
    """As Kimi K2 and K2.5 are released: all but the experts is bfloat16."""
    tensors, expected = tensors_of("kimi_k25"), {}
    weights = {"type": "int", "num_bits": 4, "strategy": "group", "group_size": 8}
    case = {"format": "pack-quantized", "weights": weights | {"symmetric": True}}
    random = np.random.default_rng(0)
    for key in [key for key in tensors if EXPERT.fullmatch(key)]:
        rows, columns = tensors.pop(key).shape
        values = random.integers(-8, 8, (rows, columns))
        scales = random.uniform(0.1, 1, (rows, columns // 8)).astype(BFLOAT16)
        words = (values + 8).reshape(rows, -1, 8) << np.arange(0, 32, 4)
        tensors[f"{key}_packed"] = words.sum(-1).astype(np.uint32).view(np.int32)
        tensors[f"{key}_scale"] = scales
        spread = scales.astype(np.float32).repeat(8, axis=1)
        expected[key] = (values * spread).astype(BFLOAT16)
    text = json.loads((ROOT / "kimi_k25" / "config.json").read_text())["text_config"]
    text["quantization_config"] = scheme(case)
    checkpoint = write(tmp_path, "kimi_k25", tensors, text_config=text)
    assert checkpoint.dtype == BFLOAT16
    place = "language_model.model.layers.1.mlp.experts.4"
    gate, up, down = checkpoint.read_experts([4])[4][0]
    np.testing.assert_array_equal(gate, expected[f"{place}.gate_proj.weight"])
    np.testing.assert_array_equal(up, expected[f"{place}.up_proj.weight"])
    np.testing.assert_array_equal(down, expected[f"{place}.down_proj.weight"].T)
    plain = HuggingFaceCheckpoint(ROOT / "kimi_k25").read_dense()
    for key, value in checkpoint.read_dense().items():
        np.testing.assert_array_equal(value, plain[key])
