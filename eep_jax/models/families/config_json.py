"""Reader of config.json: checks the type of every field, and rejects unsupported values."""

import math

from eep_jax.errors import CheckpointError
from eep_jax.model_config import RopeConfig

_REQUIRED = object()
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


class Fields:
    """The fields of one config.json.

    Methods raise CheckpointError, which names file, field, value and expectation.
    """

    def __init__(self, values: dict, path: str):
        self.values, self.path = values, path

    def take(self, name: str, kind: type = int, default=_REQUIRED):
        """The field as `kind`, or `default` if it is absent or null."""
        value = self.values.get(name)
        if value is None:
            if default is _REQUIRED:
                raise CheckpointError(f"{self.path} has no {name}, expected {kind.__name__}")
            return default
        fits = isinstance(value, int | float) if kind is float else isinstance(value, kind)
        if not fits or (isinstance(value, bool) and kind is not bool):
            raise CheckpointError(f"{self.path}: {name}={value!r} is not of type {kind.__name__}")
        return kind(value)

    def require(self, name: str, *allowed) -> None:
        """Rejects other values than these; an absent or null field means the first of them."""
        value = self.values.get(name)
        if value is not None and value not in allowed:
            raise CheckpointError(
                f"{self.path}: {name}={value!r} is not supported, only {_listed(allowed)}"
            )

    def heads(self) -> dict:
        """Head counts; `head_dim` is hidden_size / num_attention_heads unless given."""
        heads = self.take("num_attention_heads")
        return {
            "query_heads": heads,
            "kv_heads": self.take("num_key_value_heads", default=heads),
            "head_dim": self.take("head_dim", default=self.take("hidden_size") // heads),
        }

    def experts(self) -> int:
        """The number of routed experts of a layer, under any of its historical names."""
        names = [name for name in _EXPERTS if self.values.get(name) is not None]
        return self.take((names or _EXPERTS)[0])

    def common(self, name: str) -> dict:
        """ModelConfig fields that all families share."""
        self.require("hidden_act", "silu", "swish")
        self.require("pretraining_tp", 1)
        first, *others = self._end_tokens()
        return {
            "name": name,
            "vocab_size": self.take("vocab_size"),
            "hidden": self.take("hidden_size"),
            "layers": self.take("num_hidden_layers"),
            "experts_per_token": self.take("num_experts_per_tok"),
            "rope_theta": self.rope_theta(),
            "norm_eps": self.take("rms_norm_eps", float, 1e-6),
            "bos_token": self.take("bos_token_id", default=-1),
            "eos_token": first,
            "more_eos_tokens": tuple(others),
            "tied_embeddings": self.take("tie_word_embeddings", bool, False),
        }

    def _end_tokens(self) -> list[int]:
        value = self.values.get("eos_token_id")
        tokens = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(token, int) for token in tokens):
            raise CheckpointError(
                f"{self.path}: eos_token_id={value!r} must be a token id or a list of them"
            )
        return tokens or [-1]

    def _rope_fields(self) -> "Fields":
        """Newer files have `rope_parameters`; older ones `rope_theta` and `rope_scaling`."""
        newer, older = self.values.get("rope_parameters"), self.values.get("rope_scaling")
        values = newer or older or {}
        if not isinstance(values, dict):
            raise CheckpointError(f"{self.path}: rope_parameters={values!r} must be an object")
        where = "rope_parameters" if newer else "rope_scaling"
        return Fields(values, f"{self.path}, {where}")

    def rope_theta(self) -> float:
        rope = self._rope_fields()
        return rope.take("rope_theta", float, self.take("rope_theta", float, 10_000.0))

    def rope(self, channels: int, *, interleaved: bool = False) -> RopeConfig:
        """Rotary embedding of heads with `channels` rotatable channels, as in transformers."""
        fields = self._rope_fields()
        kind = fields.take("rope_type", str, fields.take("type", str, "default"))
        part = fields.take(
            "partial_rotary_factor", float, self.take("partial_rotary_factor", float, 1.0)
        )
        rotated = int(channels * part) if part != 1 else 0
        if kind == "default":
            return RopeConfig(interleaved=interleaved, rotated_channels=rotated)
        if kind != "yarn":
            raise CheckpointError(
                f"{fields.path}: rope_type={kind!r} is not supported, only 'default' and 'yarn'"
            )
        original = fields.take("original_max_position_embeddings")
        longest = self.take("max_position_embeddings", default=original)
        factor = fields.take("factor", float, longest / original)
        return RopeConfig(
            kind="yarn",
            interleaved=interleaved,
            rotated_channels=rotated,
            factor=factor,
            original_positions=original,
            beta_fast=fields.take("beta_fast", float, 32.0),
            beta_slow=fields.take("beta_slow", float, 1.0),
            truncate=fields.take("truncate", bool, True),
            amplitude=_amplitude(fields, factor),
        )

    def yarn_score_factor(self) -> float:
        """DeepSeek's factor of scores: the square of the amplitude for `mscale_all_dim`."""
        fields = self._rope_fields()
        scale = fields.take("mscale_all_dim", float, 0.0)
        return _mscale(fields.take("factor", float, 1.0), scale) ** 2 if scale else 1.0


def _amplitude(fields: Fields, factor: float) -> float:
    if (given := fields.take("attention_factor", float, None)) is not None:
        return given
    scale = fields.take("mscale", float, 0.0)
    scale_all = fields.take("mscale_all_dim", float, 0.0)
    if scale and scale_all:
        return _mscale(factor, scale) / _mscale(factor, scale_all)
    return _mscale(factor, 1.0)


def _mscale(factor: float, scale: float) -> float:
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _listed(values: tuple) -> str:
    return " and ".join(repr(value) for value in values)
