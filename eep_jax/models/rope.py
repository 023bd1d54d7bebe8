"""Rotary position embedding: the angle of each pair of channels, and the rotation."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32

from eep_jax.model_config import RopeConfig

DEFAULT = RopeConfig()


def rope(
    x: Float[Array, "*T H C"],
    positions: Int32[Array, "*T"],
    theta: float,
    config: RopeConfig = DEFAULT,
) -> Float[Array, "*T H C"]:
    """Rotates channel pairs (c, c + C/2) by `position * theta ** (-2c / C)`, in float32.

    RoFormer's rotation, in NeoX order. `config` can restrict it to fewer channels, read adjacent
    pairs (returned in NeoX order, which changes no product of queries and keys), and stretch the
    frequencies. Returns the dtype of x.
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


def frequencies(channels: int, theta: float, config: RopeConfig = DEFAULT) -> Float32[Array, "_"]:
    """Radians per position of each of `channels / 2` pairs, fastest first.

    `linear` divides all by `factor`. With the others, frequencies of more than `beta_fast` turns in
    `original_positions` are kept, those of fewer than `beta_slow` divided by `factor`, with a ramp
    in between: YaRN's (arXiv 2309.00071) is linear in the pairs, Llama 3's in the turns.
    """
    half = channels // 2
    if config.kind in ("default", "dynamic"):
        return theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    plain = np.float32(theta) ** (-np.arange(half, dtype=np.float32) / half)
    if config.kind == "linear":
        return jnp.asarray(plain / config.factor, jnp.float32)
    if config.kind == "llama3":
        turns = config.original_positions * plain / (2 * math.pi)
        kept = np.clip((turns - config.beta_slow) / (config.beta_fast - config.beta_slow), 0, 1)
        return jnp.asarray(plain * (kept + (1 - kept) / config.factor), jnp.float32)
    pair_of = lambda turns: (
        half * math.log(config.original_positions / (turns * 2 * math.pi)) / math.log(theta)
    )
    first, last = pair_of(config.beta_fast), pair_of(config.beta_slow)
    if config.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, channels - 1)
    # A ramp of zero length is a step.
    ramp = np.clip((np.arange(half) - first) / max(last - first, 1e-3), 0, 1)
    return jnp.asarray(plain / config.factor * ramp + plain * (1 - ramp), jnp.float32)
