"""A rank as a process of its own: a compiled step of three exchanges over a heap that others map.

It does what messages on a socket say, one after the other, except an abort, which a second thread
carries out at once, as the link thread of a rank does. When its parent is gone, it ends.

python -m tests.gpu.exchange_process RANK DESCRIPTOR     # of the socket

Ranks go around the GPUs of EEP_TEST_GPUS (0,1), or all there are; each sees its own alone. With
fewer GPUs than ranks some share one. EEP_GPU_RANKS is how many ranks there are (4).
"""

import dataclasses
import multiprocessing.connection
import os
import pathlib
import queue
import signal
import subprocess
import sys
import threading
import time
import traceback

import numpy as np

RANKS = int(os.environ.get("EEP_GPU_RANKS", "4"))
TOKENS, CHOICES, HIDDEN, SLOTS, LAYERS = 16, 4, 256, 4, 3
SKEWS = (0.0, 1.2)  # exponents of Zipf over slots, by turns of the seed
START_DEADLINE_S = 180  # of JAX, CUDA and the compiler, on a busy machine
REPLY_DEADLINE_S = 60
MEMORY_FRACTION = "0.03"  # of the GPU, for each process's JAX: the step needs little


def gpu_of(rank: int) -> dict[str, str]:
    """The variable that shows a rank its own GPU; none where this machine has no GPU."""
    from launch.environments.local import parse_gpus, visible_gpus

    named = os.environ.get("EEP_TEST_GPUS")
    gpus = parse_gpus(named) if named else visible_gpus()
    return {"CUDA_VISIBLE_DEVICES": gpus[rank % len(gpus)]} if gpus else {}


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a rank says of a run of steps; `y` and `seconds` are those of the last one."""

    completed: int  # steps that ended without suspicion
    y: np.ndarray
    suspicion: list[int]
    seconds: float
    compilations: int  # since the process was ready


class RankProcess:
    """The other end: every answer has a deadline, and only this process is ever signalled."""

    def __init__(self, rank: int, directory: pathlib.Path, name: str = ""):
        """Starts it; it is of use after `await_ready`. `directory` is for its log and the cache."""
        self.rank, self.log = rank, directory / f"rank{rank}{name}.log"
        self._socket, theirs = multiprocessing.connection.Pipe()
        variables = {
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "XLA_PYTHON_CLIENT_MEM_FRACTION": MEMORY_FRACTION,
            "JAX_COMPILATION_CACHE_DIR": str(directory / "cache"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        } | gpu_of(rank)
        with theirs, self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(rank), str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=os.environ | variables,
                pass_fds=[theirs.fileno()],
            )
        self.handle = ""

    def await_ready(self) -> "RankProcess":
        if not self.handle:
            self.handle = self.answer(START_DEADLINE_S)
        return self

    def tell(self, verb: str, **arguments) -> None:
        self._socket.send((verb, arguments))

    def answer(self, deadline_s: float = REPLY_DEADLINE_S):
        """Raises TimeoutError, or RuntimeError where the process failed; both hold its log."""
        try:
            if not self._socket.poll(deadline_s):
                raise TimeoutError(f"rank {self.rank}: no answer in {deadline_s} s\n{self._tail()}")
            found = self._socket.recv()
        except (EOFError, ConnectionError) as error:
            raise RuntimeError(f"rank {self.rank} ended\n{self._tail()}") from error
        if isinstance(found, Exception):
            raise RuntimeError(f"rank {self.rank} failed: {found}\n{self._tail()}")
        return found

    def ask(self, verb: str, **arguments):
        self.tell(verb, **arguments)
        return self.answer()

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        """Ends it as a crash does; may be called twice."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        self.process.wait(REPLY_DEADLINE_S)
        self._socket.close()

    def _tail(self) -> str:
        return self.log.read_text(errors="replace")[-3000:]


def a_step_work(seed: int):
    """What all ranks bring to a step: positive numbers, so that no sum cancels. No slot twice."""
    from benchmarks.loopback import random_routing
    from tests.support.kernels import Exchange

    random = np.random.default_rng(seed)
    skew = SKEWS[seed % len(SKEWS)]
    slots = random_routing(random, RANKS, TOKENS, CHOICES, RANKS * SLOTS, skew)
    slots[random.random(slots.shape) < 0.1] = -1
    # Multiples of 1/8 are exact in bfloat16.
    x = random.integers(1, 16, (RANKS, TOKENS, HIDDEN)).astype(np.float32) / 8
    weights = random.uniform(0.1, 0.5, slots.shape).astype(np.float32)
    return Exchange(x, slots, weights, np.ones(RANKS, np.int32), SLOTS)


class Rank:
    """One rank's heap and executable."""

    def __init__(self, rank: int):
        import jax

        from eep_jax.engine.lockstep import Lockstep
        from eep_jax.heap.arrays import heap_argument
        from eep_jax.heap.open import open_heap
        from pallas_kernels.window import WindowLayout, round_up

        self.rank, platform = rank, jax.default_backend()
        dtype = "bfloat16" if platform == "gpu" else "float32"
        self.layout = WindowLayout(RANKS, TOKENS, CHOICES, HIDDEN, "per_choice", dtype)
        slab_bytes = round_up(self.layout.window_bytes, 4096)
        self.heap = open_heap(rank, RANKS, slab_bytes, platform)
        self.array = heap_argument(self.heap)
        self.lockstep = Lockstep(self.layout, self.heap)
        self.compilations = 0
        jax.monitoring.register_event_duration_secs_listener(self._on_event)
        self.poison()
        alone = np.eye(RANKS, dtype=np.int32)[rank]
        arguments = self._arguments(a_step_work(0), self._call(0, alone, 1000))
        self.executable = jax.jit(self._step).lower(*arguments).compile()
        self.steps(epoch=0, active=alone, seed=0)  # the first run is never timed
        self.compilations, self.round = 0, None

    def _on_event(self, event: str, duration: float, **_) -> None:
        self.compilations += event == "/jax/core/compile/backend_compile_duration"

    def _step(self, x, slots, weights, heap, call):
        import jax.numpy as jnp

        from pallas_kernels.combine.api import combine
        from pallas_kernels.dispatch.api import dispatch
        from pallas_kernels.exchange.call import Choices, ExchangeSpec

        choices = Choices(slots, weights)
        spec = ExchangeSpec(self.layout, SLOTS, self.heap.slab_bytes)
        for _ in range(LAYERS):
            found, received, suspicion, _ = dispatch(x, choices, heap, call, spec)
            here = received.slots
            rows = found.array() if hasattr(found, "array") else found
            # The expert of flat slot i multiplies by (i + 1) / 4.
            scale = jnp.where(here >= 0, (here + (self.rank * SLOTS + 1)) / 4, 0)
            results = (scale[..., None] * rows[:, :, None].astype(jnp.float32)).astype(x.dtype)
            call = call.after(suspicion)
            y, suspicion = combine(results, received, choices, heap, call, spec)
            call = call.after(suspicion).next()
            x = y.astype(x.dtype)
        return y, call.suspicion, call.round

    def _call(self, current: int, active, deadline_ms: int):
        from pallas_kernels.exchange.call import Call, address_words

        return Call(
            rank=np.int32(self.rank),
            active=np.asarray(active, np.int32),
            epoch=np.uint32(current >> 20),
            round=np.uint32(current),
            deadline_ms=np.uint32(deadline_ms),
            vote=np.uint32(1),
            suspicion=np.zeros(RANKS, np.int32),
            abort_address=address_words(self.heap.control_address()),
        )

    def _arguments(self, work, call):
        x = work.x[self.rank].astype(np.dtype(self.layout.row_dtype))
        return x, work.slots[self.rank], work.weights[self.rank], self.array, call

    def steps(
        self, *, epoch: int, active, seed: int, count: int = 1, deadline_ms: int = 30_000
    ) -> Outcome:
        """Steps until one raises a suspicion; they go on where the epoch's last step ended."""
        from pallas_kernels.exchange.signals import first_round

        work, completed = a_step_work(seed), 0
        if getattr(self, "round", None) is None or self.round >> 20 != epoch:
            self.round = first_round(epoch)
        for _ in range(count):
            start = time.monotonic()
            call = self._call(self.round, active, deadline_ms)
            out = self.executable(*self._arguments(work, call))
            y, suspicion, following = (np.asarray(part) for part in out)
            seconds = time.monotonic() - start
            if suspicion.any():
                break
            self.round, completed = int(following), completed + 1
        accused = np.flatnonzero(suspicion).tolist()
        return Outcome(completed, y, accused, seconds, self.compilations)

    def poison(self) -> None:
        """Rows of NaN and real slots in the own window, as an earlier life may have left them."""
        layout = self.layout
        first = layout.regions["slots"].offset
        garbage = np.full(layout.window_bytes - first, 0xFF, np.uint8)
        garbage[: layout.regions["slots"].bytes] = 0
        self.heap.write(first, garbage)

    def attach(self, rank: int, handle: str) -> None:
        self.heap.attach(rank, handle)

    def detach(self, rank: int) -> None:
        self.heap.detach(rank)

    def clear(self) -> None:
        self.lockstep.clear_flags()

    def where(self) -> tuple[int, int]:
        """Addresses that must never change."""
        return self.heap.base, self.array.unsafe_buffer_pointer()


def main(rank: int, descriptor: int) -> None:
    socket, work = multiprocessing.connection.Connection(descriptor), queue.Queue()
    this = Rank(rank)
    socket.send(this.heap.export())

    def listen() -> None:
        try:
            while True:
                verb, arguments = socket.recv()
                if verb == "abort":
                    this.lockstep.abort(arguments["epoch"])
                else:
                    work.put((verb, arguments))
        except BaseException:
            os._exit(0)  # the parent is gone; a step of ours may wait for a minute

    threading.Thread(target=listen, name="link", daemon=True).start()
    while True:
        verb, arguments = work.get()
        try:
            socket.send(getattr(this, verb)(**arguments))
        except Exception as error:
            traceback.print_exc()
            socket.send(RuntimeError(f"{verb}: {error}"))


if __name__ == "__main__":
    # By its own name, under which the parent unpickles what is sent.
    from tests.gpu.exchange_process import main as run

    run(*map(int, sys.argv[1:]))
