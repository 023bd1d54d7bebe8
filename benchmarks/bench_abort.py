"""Time until a kernel that waits for a silent rank ends, once the abort word is set.

python -m benchmarks.bench_abort --out=benchmarks/results/abort.jsonl

One rank on a GPU, with its control page as in a process. Each sample starts an exchange whose peer
never sends, sets the word from another thread, and takes the time from that store until the host
sees the kernel's output. The answer is checked: the step reports the abort and suspects no
rank; without the word it ends by its deadline and suspects the silent rank.
"""

import os
import random
import threading
import time

from absl import flags

from benchmarks import command
from benchmarks.harness import Record, Sheet, Unfit, percentile

SAMPLES, SAMPLES_QUICK = 50, 5
DEADLINE_MS, TOKENS, CHOICES, HIDDEN, SLOTS = 5_000, 8, 4, 1024, 8


def main() -> list[Record]:
    os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", "0.2")
    import jax
    import jax.numpy as jnp
    import numpy as np

    from eep_jax.heap.arrays import heap_array
    from eep_jax.heap.open import open_heap
    from pallas_kernels.dispatch.api import dispatch
    from pallas_kernels.exchange.call import Call, Choices, ExchangeSpec, address_words
    from pallas_kernels.exchange.signals import first_round
    from pallas_kernels.window import WindowLayout

    layout = WindowLayout(
        ranks=2, tokens=TOKENS, choices=CHOICES, hidden=HIDDEN, row_dtype="bfloat16"
    )
    heap = open_heap(0, 2, layout.window_bytes + -layout.window_bytes % 4096, "gpu")
    word = heap.control()[0, :4].view(np.uint32)
    x = jnp.ones((TOKENS, HIDDEN), jnp.bfloat16)
    slots, weights = jnp.zeros((TOKENS, CHOICES), jnp.int32), jnp.ones((TOKENS, CHOICES))
    memory, address = heap_array(heap), heap.control_address()

    def call(epoch: int, deadline_ms: int) -> Call:
        return Call(
            rank=np.int32(0),
            active=np.ones(2, np.int32),
            epoch=np.uint32(epoch),
            round=np.uint32(first_round(epoch)),
            deadline_ms=np.uint32(deadline_ms),
            vote=np.uint32(0),
            suspicion=np.zeros(2, np.int32),
            abort_address=address_words(address),
        )

    def exchange(x, slots, weights, memory, call):
        choices = Choices(slots, weights)
        return dispatch(x, choices, memory, call, ExchangeSpec(layout, SLOTS))[2]

    run = jax.jit(exchange).lower(x, slots, weights, memory, call(1, 1)).compile()
    silent = np.asarray(run(x, slots, weights, memory, call(1, 20)))
    if silent.tolist() != [0, 1]:
        raise Unfit(f"a deadline of 20 ms gave suspicion {silent}, expected [0 1]")
    samples, took_ms = SAMPLES_QUICK if flags.FLAGS.quick else SAMPLES, []
    for epoch in range(2, 2 + samples):
        stored = []

        def store(epoch=epoch, stored=stored):
            time.sleep(random.uniform(0.005, 0.03))
            stored.append(time.perf_counter())
            word[0] = epoch + 1
            heap.post_abort(epoch + 1)

        thread = threading.Thread(target=store)
        thread.start()
        found = np.asarray(run(x, slots, weights, memory, call(epoch, DEADLINE_MS)))
        ended = time.perf_counter()
        thread.join()
        if found.tolist() != [1, 0]:
            raise Unfit(f"an aborted step gave suspicion {found}, expected [1 0]")
        took_ms.append((ended - stored[0]) * 1e3)
    shape = {"deadline_ms": DEADLINE_MS, "samples": len(took_ms)}
    sheet = Sheet("abort", jax.devices()[0].device_kind, 2, shape)
    for percent in (50, 99):
        r = sheet.add(f"p{percent}_ms", percentile(took_ms, percent), "ms", bound=1.0)
        print(f"abort {r.metric}: {r.value:.3f} ms from the store to the host's return")
    return sheet.records


if __name__ == "__main__":
    command.define_gpu()
    command.run(main)
