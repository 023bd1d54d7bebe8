"""Reader of config.json: checks the type of every field, and rejects unsupported values.

A field that is absent has its family's default, or is required. A field that is null has a meaning
only where its family gives it one. Two names of one field must agree.
"""

import math
from collections.abc import Mapping

from eep_jax.errors import CheckpointError

_REFUSED = object()
_ALIASES = (
    ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
    ("num_experts_per_tok", "moe_k", "experts_per_token"),
)
_NAMES_OF = {name: names for names in _ALIASES for name in names}

# Fields of transformers' configurations that change no logit.
WITHOUT_EFFECT = frozenset(
    {
        "_name_or_path",
        "attention_dropout",
        "auto_map",
        "aux_loss_alpha",
        "chunk_size_feed_forward",
        "dtype",
        "ep_size",
        "id2label",
        "initializer_range",
        "is_encoder_decoder",
        "label2id",
        "max_position_embeddings",  # but where RoPE is stretched, see rope_json.py
        "model_type",
        "num_mtp_layers",  # layers that predict further tokens are left out
        "num_nextn_predict_layers",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "pad_token_id",
        "problem_type",
        "quantization_config",  # of the files, see quantized.py
        "return_dict",
        "router_aux_loss_coef",
        "router_jitter_noise",
        "seq_aux",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)


class Fields:
    """The fields of one config.json.

    Args:
        values: The JSON object.
        path: Its file, for messages.
        defaults: Values of absent fields, as transformers' class of the family has them.

    Methods raise CheckpointError, which names file, field, value and expectation.
    """

    def __init__(self, values: dict, path: str, defaults: Mapping | None = None):
        self.values, self.path, self.defaults = values, path, defaults or {}
        self.read = {"architectures"}  # names of fields

    def take(self, name: str, kind: type = int, null=_REFUSED):
        """The field as `kind`, its default if it is absent, or `null` if it is null.

        >>> Fields({"num_local_experts": 8}, "config.json").take("num_experts")
        8
        """
        found = self._found(name)
        value = self._default(name, kind) if found is None else self.values[found]
        if value is None and null is not _REFUSED:
            return null
        fits = isinstance(value, int | float) if kind is float else isinstance(value, kind)
        if kind is float and fits and not math.isfinite(value):
            raise CheckpointError(f"{self.path}: {found or name}={value!r} must be finite")
        if not fits or (isinstance(value, bool) and kind is not bool):
            raise CheckpointError(
                f"{self.path}: {found or name}={value!r} is not of type {kind.__name__}"
            )
        return kind(value)

    def put(self, name: str, value) -> None:
        """Gives a field the value that other fields imply."""
        self.values = self.values | {name: value}

    def require(self, name: str, *allowed) -> None:
        """Rejects other values than these; an absent field means the first of them.

        So does null, if that one is false, empty or zero.
        """
        self.read.add(name)
        value = self.values.get(name, allowed[0])
        if value not in allowed and (value is not None or allowed[0]):
            raise CheckpointError(
                f"{self.path}: {name}={value!r} is not supported, only {_listed(allowed)}"
            )

    def heads(self) -> dict:
        """Head counts; `head_dim` is hidden_size / num_attention_heads unless given."""
        heads = self.take("num_attention_heads")
        return {
            "query_heads": heads,
            "kv_heads": self.take("num_key_value_heads", null=heads),
            "head_dim": self.take("head_dim", null=self.take("hidden_size") // max(heads, 1)),
        }

    def common(self, name: str) -> dict:
        """ModelConfig fields that all families share."""
        self.require("hidden_act", "silu", "swish")
        self.require("pretraining_tp", 1)
        self.require("moe_layer_freq", 1)
        first, *others = self._end_tokens()
        return {
            "name": name,
            "vocab_size": self.take("vocab_size"),
            "hidden": self.take("hidden_size"),
            "layers": self.take("num_hidden_layers"),
            "experts": self.take("num_experts"),
            "experts_per_token": self.take("num_experts_per_tok"),
            "norm_eps": self.take("rms_norm_eps", float),
            "bos_token": self.take("bos_token_id", null=-1),
            "eos_token": first,
            "more_eos_tokens": tuple(others),
            "tied_embeddings": self.take("tie_word_embeddings", bool),
        }

    def window(self) -> int:
        """The attention window, 0 for null. Raises CheckpointError unless it is positive."""
        window = self.take("sliding_window", null=0)
        if window < 0 or self.values.get("sliding_window") == 0:
            raise CheckpointError(
                f"{self.path}: sliding_window={window} must be positive, or null for none"
            )
        return window

    def layer_kinds(self, name: str, layers: int, *kinds: str) -> list[str] | None:
        """A list with one of `kinds` for each layer; None if it is absent or null."""
        self.read.add(name)
        found = self.values.get(name)
        if found is None:
            return None
        if not isinstance(found, list) or len(found) != layers or set(map(str, found)) - set(kinds):
            raise CheckpointError(
                f"{self.path}: {name}={found!r} must list one of {_listed(kinds)} for each layer "
                f"of num_hidden_layers={layers}"
            )
        return found

    def unread(self, without_effect=frozenset()) -> list[str]:
        """Fields of the file that were not read, and are not known to have no effect."""
        return sorted(set(self.values) - self.read - WITHOUT_EFFECT - set(without_effect))

    def _found(self, name: str) -> str | None:
        """The name under which the file has the field. Raises if two names disagree."""
        names = _NAMES_OF.get(name, (name,))
        self.read.update(names)
        present = [other for other in names if other in self.values]
        given = [other for other in present if self.values[other] is not None]
        for other in given[1:]:
            if self.values[other] != self.values[given[0]]:
                raise CheckpointError(
                    f"{self.path}: {given[0]}={self.values[given[0]]!r} and "
                    f"{other}={self.values[other]!r} name the same; remove one"
                )
        return next(iter(given or present), None)

    def _default(self, name: str, kind: type):
        if name not in self.defaults:
            raise CheckpointError(f"{self.path} has no {name}, expected {kind.__name__}")
        return self.defaults[name]

    def _end_tokens(self) -> list[int]:
        self.read.add("eos_token_id")
        value = self.values.get("eos_token_id", self.defaults.get("eos_token_id"))
        tokens = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(token, int) for token in tokens):
            raise CheckpointError(
                f"{self.path}: eos_token_id={value!r} must be a token id or a list of them"
            )
        return tokens or [-1]


def _listed(values: tuple) -> str:
    return " and ".join(repr(value) for value in values)
