"""The compiled steps of an engine, whose arguments and results keep their places on the device.

On a GPU a step is replayed as a CUDA graph. XLA updates each kernel of the graph where an address
of any argument or result is new, which costs more than the step itself. So all of a step's small
arguments are one array of 32-bit words, which a tiny program copies to where the one before was,
and all small results another, which the step replaces in place: the `state`. It also carries what
the next step needs of this one, whose results the host has not read by then: tokens, round and
suspicion.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int32

from eep_jax.config import RunConfig
from eep_jax.engine.executables import ExecutableStore
from eep_jax.engine.shaping import ShapingRows
from eep_jax.engine.step import COMPILER_OPTIONS, Batch, StepResult, empty_batch
from eep_jax.tables import Tables
from pallas_kernels.exchange.call import Call

APART = ("table", "latest", "shaping")  # fields of a batch that are not in its words
HEAD = ("vote", "round", "is_first")  # words in front of a batch's
# XLA gives kernels parts of an array in place, and Mosaic GPU takes them at multiples of 256 bytes.
ALIGNED = 64  # words


def pack_batch(batch: Batch, *head: int, apart=APART) -> Int32[np.ndarray, "W"]:
    """The fields of a batch, but those in `apart`, as 32-bit words behind those of `head`."""
    fields = _packed(batch, apart)
    sizes = [ALIGNED, *(_aligned(value.size) for _, value in fields)]
    words = np.zeros(sum(sizes), np.int32)
    words[: len(head)] = np.array(head, np.uint32).view(np.int32)
    for start, (_, value) in zip(np.cumsum(sizes)[:-1].tolist(), fields, strict=True):
        wide = value.astype(np.int32) if value.dtype == np.bool_ else value
        words[start : start + value.size] = np.ascontiguousarray(wide).reshape(-1).view(np.int32)
    return words


def unpack_batch(
    words: Int32[Array, "W"], like: Batch, head: int, apart=APART
) -> tuple[list, Batch]:
    """Inside a step: the words in front, and the batch; fields in `apart` are those of `like`."""
    start, found = ALIGNED, {}
    for name, model in _packed(like, apart):
        part = words[start : start + model.size].reshape(model.shape)
        start += _aligned(model.size)
        is_flag = model.dtype == np.bool_
        found[name] = part != 0 if is_flag else lax.bitcast_convert_type(part, model.dtype)
    front = [words[i].astype(jnp.uint32) for i in range(head)]
    return front, dataclasses.replace(like, **found)


def _aligned(words: int) -> int:
    return -(-words // ALIGNED) * ALIGNED


def _packed(batch: Batch, apart) -> list[tuple[str, np.ndarray]]:
    fields = ((field.name, getattr(batch, field.name)) for field in dataclasses.fields(Batch))
    return [(name, value) for name, value in fields if name not in apart and value is not None]


# Arguments of steps that change with requests of some kinds, and with an epoch.
Lasting = tuple[ShapingRows, Tables, Call]


@dataclasses.dataclass(frozen=True)
class Results:
    """What the host reads of a step: fields of `StepResult` with B instead of S entries."""

    tokens: np.ndarray
    finite: np.ndarray
    dropped: np.ndarray
    chosen: np.ndarray
    suspicion: np.ndarray
    round: np.uint32
    agreed: np.uint32


class StateLayout:
    """Places of a step's results in its state, an int32 array."""

    def __init__(self, config: RunConfig):
        rows, one = (config.engine.batch_rows,), (1,)
        self.shapes = {
            "latest": rows,
            "tokens": rows,
            "finite": rows,
            "dropped": rows,
            "chosen": (config.model.experts,),
            "suspicion": (config.cluster.ranks,),
            "round": one,
            "agreed": one,
        }
        self.words = sum(_aligned(math.prod(shape)) for shape in self.shapes.values())

    def pack(self, result: StepResult) -> Int32[Array, "W"]:
        parts = []
        for name, (size,) in self.shapes.items():
            value = jnp.atleast_1d(getattr(result, name)).astype(jnp.int32)
            parts.append(jnp.pad(value, (0, _aligned(size) - len(value))))
        return jnp.concatenate(parts)

    def views(self, state) -> dict:
        """Parts of a state by name, of an array of JAX or of NumPy."""
        found, start = {}, 0
        for name, (size,) in self.shapes.items():
            found[name] = state[start : start + size]
            start += _aligned(size)
        return found

    def results(self, state: np.ndarray) -> Results:
        found = self.views(state)
        found["finite"] = found["finite"] != 0
        for name in ("round", "agreed"):
            found[name] = found[name].view(np.uint32)[0]
        return Results(**{field.name: found[field.name] for field in dataclasses.fields(Results)})


class PackedSteps:
    """Steps of all sizes, called with a batch and a vote.

    Args:
        config: of the run.
        step: the function that `make_step` returned.
        fixed: the arguments that stay: dense weights, bank and heap.
        cache: the KV cache, which steps replace in place.
        store: keeps executables for other processes.
    """

    def __init__(self, config: RunConfig, step, fixed: tuple, cache, store: ExecutableStore):
        self._config, self._step, self._fixed, self._store = config, step, fixed, store
        self._layout = StateLayout(config)
        engine = config.engine
        self._table_host = np.zeros((engine.batch_rows, engine.pages_per_sequence), np.int32)
        self._table = jax.device_put(self._table_host)
        self.reset(cache)
        self._words: dict[int, jax.Array] = {}
        self._steps: dict[int, jax.stages.Compiled] = {}
        self._copies: dict[str, jax.stages.Compiled] = {}

    def reset(self, cache) -> None:
        """Begins anew with this cache, which a step that failed may have taken with it."""
        self.cache = cache
        self._state = jax.device_put(np.zeros(self._layout.words, np.int32))

    def replace_step(self, step) -> None:
        """Steps do this instead. Call it before `obtain`."""
        self._step = step

    def obtain(self, lasting: Lasting) -> None:
        """Loads or compiles everything for arguments of the shapes of those of `launch`."""
        self._copies["table"] = self._copy("table", self._table)
        lower = jax.jit(lambda state: state + 0).lower
        self._copies["read"] = self._store.obtain(
            "read", functools.partial(lower, self._state), (self._state,), 0
        )
        for rows in self._config.engine.step_sizes:
            words = pack_batch(empty_batch(self._config, rows), *([0] * len(HEAD)))
            self._words[rows] = jax.device_put(words)
            self._copies[f"words-{rows}"] = self._copy(f"words-{rows}", self._words[rows])
            arguments = self._arguments(rows, lasting)
            jitted = jax.jit(
                functools.partial(self._packed, rows),
                donate_argnames=("cache", "state"),
                compiler_options=COMPILER_OPTIONS,
            )
            self._steps[rows] = self._store.obtain(
                f"rows-{rows}",
                lambda jitted=jitted, arguments=arguments: jitted.lower(*arguments),
                arguments,
                (jax.tree.map(lambda _: 0, self.cache), 0),
            )

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(self._steps)

    def launch(self, batch: Batch, lasting: Lasting, vote: int, round_: int | None) -> jax.Array:
        """Starts a step; returns what `read` takes.

        Args:
            batch: its tokens.
            lasting: what rarely changes, on the device.
            vote: this rank's.
            round_: of the step, whose suspicion then begins empty; None to go on where the step
                before ends.
        """
        rows = len(batch.tokens)
        if not np.array_equal(batch.table, self._table_host):
            self._table_host = batch.table.copy()
            self._table = self._copies["table"](self._table, self._table_host)
        head = vote, 0 if round_ is None else round_, round_ is not None
        words = pack_batch(batch, *map(int, head))
        self._words[rows] = self._copies[f"words-{rows}"](self._words[rows], words)
        self.cache, self._state = self._steps[rows](*self._arguments(rows, lasting))
        return self._copies["read"](self._state)

    def read(self, launched: jax.Array) -> Results:
        """Waits for a step."""
        return self._layout.results(np.asarray(launched))

    def _copy(self, name: str, array: jax.Array) -> jax.stages.Compiled:
        """A program that puts an array where the one before was."""
        start = (0,) * array.ndim
        jitted = jax.jit(
            lambda old, new: lax.dynamic_update_slice(old, new, start), donate_argnums=0
        )
        arguments = array, np.zeros(array.shape, array.dtype)
        return self._store.obtain(name, lambda: jitted.lower(*arguments), arguments, 0)

    def _arguments(self, rows: int, lasting: Lasting) -> tuple:
        dense, bank, heap = self._fixed
        own = self._table, self._state, self._words[rows]
        return dense, bank, self.cache, heap, lasting, *own

    def _packed(self, rows, dense, bank, cache, heap, lasting, table, state, words):
        (shaping, tables, call), before = lasting, self._layout.views(state)
        apart = {"table": table, "latest": before["latest"], "shaping": shaping}
        like = dataclasses.replace(empty_batch(self._config, rows), **apart)
        (vote, round_, is_first), batch = unpack_batch(words, like, len(HEAD))
        fresh = is_first != 0
        call = dataclasses.replace(
            call,
            vote=vote,
            round=jnp.where(fresh, round_, before["round"][0].astype(jnp.uint32)),
            suspicion=jnp.where(fresh, 0, before["suspicion"]),
        )
        result = self._step(dense, bank, cache, heap, tables, batch, call)
        return result.cache, self._layout.pack(result)
