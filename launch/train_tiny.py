"""Trains the small byte-level MoE of the CPU demo on a text file, and writes its Orbax checkpoint.

    python -m launch.train_tiny --text=kjv.txt --out=configs/tiny_checkpoint

This made the shipped checkpoint, with the default flags, in about 40 minutes on two cores. Its text
is the King James Bible (public domain) as packaged by Debian (bible-kjv, bible-kjv-text):

    bible -f gen1:1-rev22:21 | cut -d' ' -f2- > kjv.txt
"""

import pathlib
import time

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from absl import flags
from flax import nnx

from eep_jax.models.decoder import DenseModel
from eep_jax.models.weights import build_dense_model, split_model
from eep_jax.storage.checkpoint import save_checkpoint
from launch import program
from launch.config_files import load_config
from launch.errors import UsageError

TEXT = flags.DEFINE_string("text", None, "Plain text to train on.", required=True)
OUT = flags.DEFINE_string(
    "out", None, "Directory of the checkpoint; must not exist.", required=True
)
STEPS = flags.DEFINE_integer("steps", 4000, "Optimizer steps.", lower_bound=1)
BATCH = flags.DEFINE_integer("batch", 8, "Sequences per step.", lower_bound=1)
WINDOW = flags.DEFINE_integer("window", 512, "Bytes per sequence.", lower_bound=16)
RATE = flags.DEFINE_float("learning_rate", 3e-3, "Peak learning rate.", lower_bound=0.0)
SEED = flags.DEFINE_integer("seed", 0, "Seed of weights and of batches.")

HELD_OUT_EVERY = 20  # every 20th block of the text is held out
HELD_OUT_BLOCK_BYTES = 16_384
CAPACITY = 1.5  # rows of an expert in training, as a multiple of the mean
BALANCE_WEIGHT = 0.01  # of the Switch load-balancing loss


def split_text(data: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns (training bytes, held-out bytes); the held-out blocks are spread over the text."""
    blocks = np.arange(len(data)) // HELD_OUT_BLOCK_BYTES
    held_out = blocks % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
    return data[~held_out], data[held_out]


def windows(data: np.ndarray, starts: np.ndarray, length: int, bos: int) -> np.ndarray:
    """Rows `[bos, data[start : start + length]]` of type int32."""
    body = data[starts[:, None] + np.arange(length)[None, :]].astype(np.int32)
    return np.concatenate([np.full((len(starts), 1), bos, np.int32), body], axis=1)


@jax.custom_vjp
def gather_rows(x, index, inverse):
    """`x[index]` with zeros where the index is out of range; the gradient gathers by `inverse`."""
    return x.at[index].get(mode="fill", fill_value=0)


def _gather_forward(x, index, inverse):
    return gather_rows(x, index, inverse), (inverse,)


def _gather_backward(saved, gradient):
    (inverse,) = saved
    rows = gradient.at[inverse].get(mode="fill", fill_value=0)
    return rows.sum(axis=tuple(range(1, inverse.ndim))), None, None


gather_rows.defvjp(_gather_forward, _gather_backward)


def sparse_experts(stacked, layer: int, x, expert_ids, weights):
    """The experts' output with at most CAPACITY times the mean number of rows for each expert.

    Equal to DenseExperts while no expert overflows; choices beyond the capacity add nothing. Needs
    a quarter of the arithmetic, and no scatter in either direction.
    """
    experts, choices = stacked.shape[0], expert_ids.shape[-1]
    flat_x, flat_ids = x.reshape(-1, x.shape[-1]), expert_ids.reshape(-1)
    rows = int(flat_ids.size / experts * CAPACITY)
    one_hot = jax.nn.one_hot(flat_ids, experts, dtype=jnp.int32)
    row = ((jnp.cumsum(one_hot, axis=0) - 1) * one_hot).sum(-1)
    none = experts * rows
    row_of_choice = jnp.where(row < rows, flat_ids * rows + row, none)
    choice_of_row = (
        jnp.full(none, flat_ids.size)
        .at[row_of_choice]
        .set(jnp.arange(flat_ids.size), mode="drop", unique_indices=True)
    )
    token_of_row = choice_of_row // choices
    by_token = row_of_choice.reshape(-1, choices)
    received = gather_rows(flat_x, token_of_row, by_token).reshape(experts, rows, -1)
    gate, up, down = jnp.moveaxis(stacked[:, layer], 1, 0)
    hidden = jax.nn.silu(jnp.einsum("erd,efd->erf", received, gate))
    hidden = hidden * jnp.einsum("erd,efd->erf", received, up)
    out = jnp.einsum("erf,efd->erd", hidden, down).reshape(none, -1)
    home = gather_rows(out, row_of_choice, choice_of_row[:, None]).reshape(*by_token.shape, -1)
    return jnp.einsum("tkd,tk->td", home, weights.reshape(-1, choices)).reshape(x.shape)


def loss_fn(model: DenseModel, tokens: jax.Array, balance_weight: float, experts=None):
    """Returns (objective, cross entropy in nats per byte)."""
    import optax

    logits, routes = model(tokens[:, :-1], experts)
    entropy = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()
    balance = sum(balance_loss(ids, scores) for ids, scores in routes) / len(routes)
    return entropy + balance_weight * balance, entropy


def balance_loss(expert_ids: jax.Array, logits: jax.Array) -> jax.Array:
    """Switch load-balancing loss: `E * sum_e token_share[e] * mean_probability[e]`, 1 is even."""
    experts = logits.shape[-1]
    chosen = jax.nn.one_hot(expert_ids, experts).sum(-2).reshape(-1, experts).mean(0)
    probability = jax.nn.softmax(logits).reshape(-1, experts).mean(0)
    return experts * jnp.sum(chosen / expert_ids.shape[-1] * probability)


def held_out_loss(model: DenseModel, data: np.ndarray, length: int, bos: int) -> float:
    """Mean cross entropy over the whole held-out text, in nats per byte."""
    starts = np.arange(0, len(data) - length + 1, length)
    graph, state = nnx.split(model)
    entropy = jax.jit(lambda state, tokens: loss_fn(nnx.merge(graph, state), tokens, 0.0)[1])
    batches = [starts[i : i + 32] for i in range(0, len(starts) // 32 * 32, 32)] or [starts]
    losses = [float(entropy(state, windows(data, batch, length, bos))) for batch in batches]
    return float(np.mean(losses))


def main() -> int:
    program.require_extra("optax", "train", "launch.train_tiny")
    import optax

    config = load_config("tiny_cpu").model
    text = np.frombuffer(pathlib.Path(TEXT.value).read_bytes(), np.uint8)
    train, held_out = split_text(text)
    if len(held_out) < WINDOW.value:
        raise UsageError(f"{TEXT.value} has {len(text)} bytes; needs at least {20 * 16_384}")
    print(f"{config.parameters:,} parameters, {len(train):,} + {len(held_out):,} bytes", flush=True)

    warmup = min(200, STEPS.value // 10 + 1)
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, RATE.value, warmup, STEPS.value + 1, RATE.value / 50
    )
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=0.1)
    )
    graph, state = nnx.split(DenseModel(config, rngs=nnx.Rngs(SEED.value)))
    moments = optimizer.init(state)

    @jax.jit
    def update(state, moments, tokens):
        objective = lambda s: loss_fn(nnx.merge(graph, s), tokens, BALANCE_WEIGHT, sparse_experts)
        (_, entropy), gradient = jax.value_and_grad(objective, has_aux=True)(state)
        changes, moments = optimizer.update(gradient, moments, state)
        return optax.apply_updates(state, changes), moments, entropy

    random, started = np.random.default_rng(SEED.value), time.monotonic()
    for step in range(STEPS.value):
        starts = random.integers(0, len(train) - WINDOW.value, BATCH.value)
        tokens = windows(train, starts, WINDOW.value, config.bos_token)
        state, moments, entropy = update(state, moments, tokens)
        if step % 500 == 0 or step == STEPS.value - 1:
            loss = held_out_loss(nnx.merge(graph, state), held_out, WINDOW.value, config.bos_token)
            seconds = time.monotonic() - started
            print(
                f"step {step} train {float(entropy):.4f} held out {loss:.4f} {seconds:.0f} s",
                flush=True,
            )

    # The weights are stored in bfloat16; the recorded loss is that of the rounded weights.
    rounded = jax.tree.map(lambda x: np.asarray(x).astype(ml_dtypes.bfloat16), state)
    dense, experts = split_model(nnx.merge(graph, rounded), config)
    stored = build_dense_model(config, dense, experts)
    loss = held_out_loss(stored, held_out, WINDOW.value, config.bos_token)
    facts = {
        "held_out_nats_per_byte": round(loss, 4),
        "steps": STEPS.value,
        "text_bytes": len(text),
    }
    save_checkpoint(OUT.value, config, dense, experts, facts)
    print(f"wrote {OUT.value}: held out {loss:.4f} nats per byte", flush=True)
    return 0


cli = program.runner(main)

if __name__ == "__main__":
    cli()
