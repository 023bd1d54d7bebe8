"""Reader of RoPE in config.json: `rope_parameters` of newer files, `rope_scaling` of older ones.

Both forms, and both places of a value, may stand in one file, if they say the same.
"""

import dataclasses
import math

from eep_jax.errors import CheckpointError
from eep_jax.model_config import RopeConfig
from eep_jax.models.families.config_json import Fields

_FORMS = ("rope_parameters", "rope_scaling")
_BASE = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
_ORIGINAL = "original_max_position_embeddings"
_LENGTH = "max_position_embeddings"
# Keys of the RoPE object that each kind uses, beside _BASE.
_KEYS = {
    "default": set(),
    "linear": {"factor"},
    "dynamic": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", _ORIGINAL},
    "yarn": {"factor", _ORIGINAL, "attention_factor", "beta_fast", "beta_slow"}
    | {"mscale", "mscale_all_dim", "truncate"},
}


def read_rope(
    fields: Fields,
    channels: int,
    *,
    interleaved: bool = False,
    partial: bool = False,
    latent: bool = False,
    ignored: tuple[str, ...] = (),
) -> dict:
    """The ModelConfig fields `rope_theta` and `rope`, as transformers reads them.

    >>> fields = Fields({"rope_scaling": {"type": "linear", "factor": 4.0}}, "config.json")
    >>> read_rope(fields, 64)["rope"].factor
    4.0

    Args:
        fields: The file; its defaults hold the family's theta.
        channels: Channels of a head that can rotate.
        interleaved: Whether neighbouring channels are pairs, see RopeConfig.
        partial: Whether the family can rotate a part of a head.
        latent: Whether `mscale_all_dim` scales scores, as in DeepSeek's attention.
        ignored: Further keys of the RoPE object, without effect in this family.

    Raises:
        CheckpointError: Two forms or places differ, the kind is unknown, or a key is one that the
            kind does not use.
    """
    rope = _open(fields)
    kind = rope.kind()
    rope.refuse_unused(kind, ignored)
    values = {"default": _default, "linear": _linear, "dynamic": _dynamic}
    values |= {"llama3": _llama3, "yarn": _yarn}
    config = RopeConfig(
        kind=kind,
        interleaved=interleaved,
        rotated_channels=_rotated_channels(rope, channels, partial),
        **values[kind](rope),
    )
    if latent and kind == "yarn" and (scale := rope.number("mscale_all_dim", 0.0)):
        config = dataclasses.replace(config, score_factor=_mscale(config.factor, scale) ** 2)
    return {"rope_theta": rope.beside("rope_theta", float, 10_000.0), "rope": config}


@dataclasses.dataclass(frozen=True)
class _Rope:
    """The RoPE object of a file, called `name` there, and the fields beside it."""

    fields: Fields
    name: str
    inside: Fields

    def kind(self) -> str:
        places = [(name, self.inside.values.get(name)) for name in ("rope_type", "type")]
        kind = _agreed(self.inside.path, places) or "default"
        if kind not in _KEYS:
            raise CheckpointError(
                f"{self.inside.path}: rope_type={kind!r} is not supported, only {sorted(_KEYS)}"
            )
        return kind

    def refuse_unused(self, kind: str, ignored: tuple[str, ...]) -> None:
        unused = sorted(set(self.inside.values) - _BASE - _KEYS[kind] - set(ignored))
        if unused:
            shown = {key: self.inside.values[key] for key in unused}
            raise CheckpointError(
                f"{self.inside.path} holds {shown}, which rope_type={kind!r} does not use; remove "
                "it, or name the rope_type that it belongs to"
            )

    def beside(self, name: str, kind: type, default=None):
        """A value inside the object, beside it, or in both if they agree; else the default."""
        self.fields.read.add(name)
        inside, outside = self.inside.values.get(name), self.fields.values.get(name)
        if _agreed(self.fields.path, [(f"{self.name}.{name}", inside), (name, outside)]) is None:
            return self.fields.defaults.get(name, default)
        return (self.fields if inside is None else self.inside).take(name, kind)

    def number(self, name: str, default: float | None = None) -> float:
        """A number inside the object; it is required without `default`."""
        if default is not None and name not in self.inside.values:
            return default
        return self.inside.take(name, float)

    def original_positions(self) -> int:
        """Positions before stretching; where they are absent, those of the file."""
        return self.beside(_ORIGINAL, int) or self.fields.take(_LENGTH)


def _open(fields: Fields) -> _Rope:
    fields.read.update(_FORMS)
    given = {name: _form(fields, name) for name in _FORMS if fields.values.get(name) is not None}
    if not given.get("rope_scaling"):
        given.pop("rope_scaling", None)
    if not given:
        given = {"rope_parameters": dict(fields.defaults.get("rope_parameters") or {})}
    forms = list(given.values())
    if len(forms) == 2 and _contents(forms[0]) != _contents(forms[1]):
        raise CheckpointError(
            f"{fields.path}: rope_parameters={forms[0]} and rope_scaling={forms[1]} differ; keep "
            "one of them, with rope_theta in it"
        )
    _agreed(fields.path, [(f"{name}.rope_theta", v.get("rope_theta")) for name, v in given.items()])
    name = next(iter(given))
    both = forms[-1] | forms[0]
    return _Rope(fields, name, Fields(both, f"{fields.path}, {name}", {"truncate": True}))


def _form(fields: Fields, name: str) -> dict:
    """The keys of one form that are not null."""
    found = fields.values[name]
    if not isinstance(found, dict):
        raise CheckpointError(f"{fields.path}: {name}={found!r} must be an object")
    nested = sorted(key for key, inner in found.items() if isinstance(inner, dict))
    if nested:
        raise CheckpointError(
            f"{fields.path}: {name} has an object for each of {nested}, but here all layers share "
            "one RoPE; a RoPE for each type of layer is not supported"
        )
    return {key: value for key, value in found.items() if value is not None}


def _contents(form: dict) -> dict:
    """What a form says of scaling; theta may stand in one of two forms alone."""
    said = {key: value for key, value in form.items() if key not in ("rope_theta", "type")}
    return {"rope_type": form.get("type", "default")} | said


def _agreed(path: str, places: list[tuple[str, object]]):
    """The value of all places that have one; None if none has. Raises if they differ."""
    given = [(name, value) for name, value in places if value is not None]
    for name, value in given[1:]:
        if value != given[0][1]:
            raise CheckpointError(
                f"{path}: {given[0][0]}={given[0][1]!r} and {name}={value!r} differ; keep one"
            )
    return given[0][1] if given else None


def _rotated_channels(rope: _Rope, channels: int, partial: bool) -> int:
    part = rope.beside("partial_rotary_factor", float, 1.0)
    if part == 1:
        return 0
    if not partial:
        raise CheckpointError(
            f"{rope.fields.path}: partial_rotary_factor={part} is not supported here, where heads "
            "rotate whole; it must be 1 or absent"
        )
    rotated = int(channels * part)
    if not 0 < rotated <= channels:
        raise CheckpointError(
            f"{rope.fields.path}: partial_rotary_factor={part} rotates {rotated} of {channels} "
            "channels, it must be above 0 and at most 1"
        )
    return rotated if rotated < channels else 0


def _default(rope: _Rope) -> dict:
    return {}


def _linear(rope: _Rope) -> dict:
    return {"factor": rope.number("factor")}


def _dynamic(rope: _Rope) -> dict:
    return {"factor": rope.number("factor"), "original_positions": rope.fields.take(_LENGTH)}


def _llama3(rope: _Rope) -> dict:
    return {
        "factor": rope.number("factor"),
        "original_positions": rope.original_positions(),
        "beta_fast": rope.number("high_freq_factor"),
        "beta_slow": rope.number("low_freq_factor"),
    }


def _yarn(rope: _Rope) -> dict:
    original = rope.original_positions()
    # As in DeepSeek's files, the factor can be the ratio of two lengths.
    if "factor" not in rope.inside.values and _ORIGINAL in rope.inside.values:
        factor = rope.fields.take(_LENGTH) / original
    else:
        factor = rope.number("factor")
    scale, scale_all = rope.number("mscale", 0.0), rope.number("mscale_all_dim", 0.0)
    if scale and scale_all:
        amplitude = _mscale(factor, scale) / _mscale(factor, scale_all)
    else:
        amplitude = _mscale(factor, 1.0)
    return {
        "factor": factor,
        "original_positions": original,
        "beta_fast": rope.number("beta_fast", 32.0),
        "beta_slow": rope.number("beta_slow", 1.0),
        "truncate": rope.inside.take("truncate", bool),
        "amplitude": rope.number("attention_factor", amplitude),
    }


def _mscale(factor: float, scale: float) -> float:
    """YaRN's amplitude for a context that is `factor` times as long."""
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0
