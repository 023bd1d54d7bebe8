"""Rotary position embedding: which angle each pair of channels turns by, and the rotation."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from eep_jax.model_config import RopeConfig

DEFAULT = RopeConfig()


def rope(
    x: Float[Array, "*T H C"],
    positions: Int32[Array, "*T"],
    theta: float,
    config: RopeConfig = DEFAULT,
) -> Float[Array, "*T H C"]:
    """Rotates channel pairs (c, c + C/2) by `position * theta ** (-2c / C)`, in float32.

    This is RoFormer's, in NeoX order. `config` may say that fewer channels are rotated, that pairs
    stand side by side (they come out in NeoX order: queries and keys alike, so products are the
    same), and that frequencies are stretched. Returns the dtype of x.
    """
    channels = config.rotated_channels or x.shape[-1]
    angle = positions[..., None, None].astype(jnp.float32) * frequencies(channels, theta, config)
    sine, cosine = jnp.sin(angle), jnp.cos(angle)
    if config.amplitude != 1:
        sine, cosine = sine * config.amplitude, cosine * config.amplitude
    turning, rest = x[..., :channels], x[..., channels:]
    if config.interleaved:
        low, high = turning[..., 0::2], turning[..., 1::2]
    else:
        low, high = turning[..., : channels // 2], turning[..., channels // 2 :]
    turned = [low * cosine - high * sine, high * cosine + low * sine]
    parts = [*turned, rest] if rest.shape[-1] else turned
    return jnp.concatenate(parts, axis=-1).astype(x.dtype)


def frequencies(channels: int, theta: float, config: RopeConfig = DEFAULT):
    """float32 `[channels / 2]`, radians per position, fastest first.

    YaRN (arXiv 2309.00071): those that turn more often than `beta_fast` times in
    `original_positions` stay, those that turn less than `beta_slow` times are divided by `factor`,
    and between the two it is a linear ramp over the pairs.
    """
    half = channels // 2
    if config.kind == "default":
        return theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    plain = np.float32(theta) ** (-np.arange(half, dtype=np.float32) / half)
    pair_of = lambda turns: (
        half * math.log(config.original_positions / (turns * 2 * math.pi)) / math.log(theta)
    )
    first, last = pair_of(config.beta_fast), pair_of(config.beta_slow)
    if config.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, channels - 1)
    # A ramp of no length is a step.
    ramp = np.clip((np.arange(half) - first) / max(last - first, 1e-3), 0, 1)
    return jnp.asarray(plain / config.factor * ramp + plain * (1 - ramp), jnp.float32)
