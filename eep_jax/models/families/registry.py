"""Registry of the families, by the architecture that config.json names."""

import json
import logging
import pathlib

from eep_jax.errors import CheckpointError
from eep_jax.model_config import ModelConfig
from eep_jax.models.families import (
    deepseek,
    dots1,
    ernie4_5_moe,
    glm4_moe,
    gpt_oss,
    hy_v3,
    minimax_m2,
    mixtral,
    olmoe,
    qwen2_moe,
    qwen3_moe,
    qwen3_vl_moe,
)
from eep_jax.models.families.config_json import Fields
from eep_jax.models.families.tensors import Family

CONFIG = "config.json"
_log = logging.getLogger(__name__)

FAMILIES: dict[str, Family] = {
    architecture: family
    for family in (
        qwen3_moe.FAMILY,
        qwen2_moe.FAMILY,
        mixtral.FAMILY,
        olmoe.FAMILY,
        *deepseek.FAMILIES,
        gpt_oss.FAMILY,
        *glm4_moe.FAMILIES,
        minimax_m2.FAMILY,
        hy_v3.FAMILY,
        dots1.FAMILY,
        ernie4_5_moe.FAMILY,
        qwen3_vl_moe.FAMILY,
    )
    for architecture in family.architectures
}

# Architectures with a text part, which alone is served: the architecture of that part, and whether
# embeddings are tied if the file does not say; None: it must.
_KIMI = ("DeepseekV3ForCausalLM", None)
TEXT_PARTS = {
    "KimiK25ForConditionalGeneration": _KIMI,
    "Kimi_K25ForConditionalGeneration": _KIMI,
    "Glm4vMoeForConditionalGeneration": ("Glm4vMoeForConditionalGeneration", False),
    "Qwen3VLMoeForConditionalGeneration": ("Qwen3VLMoeForConditionalGeneration", False),
}


def read_config_json(directory) -> dict:
    """`config.json` of a Hugging Face directory, with the ends of generation_config.json, too.

    Of a multimodal model it is that of the text part. Raises CheckpointError if the file is missing
    or not a JSON object.
    """
    path = pathlib.Path(directory).absolute() / CONFIG
    values = text_part(_read_object(path), str(path))
    generation = path.with_name("generation_config.json")
    if generation.exists() and (ends := _read_object(generation).get("eos_token_id")) is not None:
        values["eos_token_id"] = _union(ends, values.get("eos_token_id"))
    return values


def _union(first, second):
    """Ids of two fields, each an id, a list of ids, or None; what is no id stays to be refused."""
    lists = [found if isinstance(found, list) else [found] for found in (first, second)]
    return list(dict.fromkeys(token for found in lists for token in found if token is not None))


def text_part(values: dict, path: str = CONFIG) -> dict:
    """The fields of the text part of a multimodal model; those of another as they are.

    Whether embeddings are tied, end tokens, and how weights are quantized, may stand outside it.
    """
    architecture = (values.get("architectures") or ["none"])[0]
    if architecture not in TEXT_PARTS:
        return values
    text = values.get("text_config")
    if not isinstance(text, dict):
        raise CheckpointError(f"{path}: text_config={text!r} must be an object")
    outside = ("tie_word_embeddings", "bos_token_id", "eos_token_id", "quantization_config")
    given = {name: values[name] for name in outside if values.get(name) is not None}
    part, tied = TEXT_PARTS[architecture]
    # A model's own field decides on ties, its part's on the others.
    tied = given.pop("tie_word_embeddings", tied)
    if architecture.startswith("Glm4v"):  # but in GLM either does
        tied = tied or text.get("tie_word_embeddings", False)
    if tied is None:
        raise CheckpointError(f"{path} has no tie_word_embeddings beside text_config")
    return given | text | {"tie_word_embeddings": tied, "architectures": [part]}


def read_model(directory) -> ModelConfig:
    """The model of a Hugging Face directory, named after the directory.

    Raises:
        CheckpointError: The architecture is unknown (the message lists the known ones), or a
            value is not supported (it names field and value).
    """
    root = pathlib.Path(directory).absolute()
    return model_from_config_json(read_config_json(root), root.name, str(root / CONFIG))


def model_from_config_json(values: dict, name: str, path: str = CONFIG) -> ModelConfig:
    """The model that the fields of config.json describe; errors name `path`."""
    family = family_of(values, path)
    try:
        fields = Fields(values, path, family.defaults)
        model = family.config(fields, name)
    except ValueError as error:
        raise CheckpointError(f"{path} describes an inconsistent model: {error}") from error
    if unread := fields.unread(family.without_effect):
        _log.warning("%s: fields %s are not known and have no effect", path, unread)
    return model


def family_of(values: dict, path: str = CONFIG) -> Family:
    """The family of `architectures[0]`. Raises CheckpointError listing the known ones."""
    architectures = values.get("architectures") or ["none"]
    if architectures[0] not in FAMILIES:
        raise CheckpointError(
            f"{path}: architectures={architectures!r} is not supported, only {sorted(FAMILIES)}"
        )
    return FAMILIES[architectures[0]]


def _read_object(path: pathlib.Path) -> dict:
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds a {type(values).__name__}, expected an object")
    return values
