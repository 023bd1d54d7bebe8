"""Promise: on a GPU a token is the same whatever steps its request went through.

Prompts in pieces of any of the sizes that there are steps for, alone or beside others, in any batch
row, short and beyond one chunk of keys: greedy and drawn tokens are equal.

EEP_TEST_PLATFORM=gpu python -m pytest tests/gpu/test_step_shapes.py
"""

import dataclasses

import jax
import numpy as np
import pytest

from configs import tiny_gpu
from eep_jax.config import ClusterConfig
from eep_jax.engine.step import attends_by_items
from eep_jax.heap.cuda.loopback import open_all_cuda
from pallas_kernels.attention.plan import CHUNK_TOKENS
from tests.support.engines import EngineCluster, a_request
from tests.support.models import a_model

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]

MODEL = a_model(
    vocab_size=512,
    hidden=256,
    query_heads=8,
    kv_heads=2,
    head_dim=64,
    layers=2,
    experts=8,
    expert_hidden=128,
)
CONTEXT = CHUNK_TOKENS + 1024
NEW = 8  # tokens of each answer
LENGTHS = (1, 5, 63, 64, 65, 200, CHUNK_TOKENS - 4, CHUNK_TOKENS + 100)


class GpuEngine(EngineCluster):
    def _open_heaps(self) -> list:
        return open_all_cuda(1, self.layout.slab_bytes)

    def close(self) -> None:
        jax.effects_barrier()
        for heap in self.heaps:
            heap.release()


def requests():
    dice = np.random.default_rng(0)
    prompts = [dice.integers(1, MODEL.vocab_size, length).tolist() for length in LENGTHS]
    return [
        a_request(f"{len(prompt)} tokens", prompt, NEW, temperature=0.9 * (i % 2), seed=100 + i)
        for i, prompt in enumerate(prompts)
    ]


def answers(largest: int, shapes: tuple[int, ...], at_once: int) -> dict[str, tuple[int, ...]]:
    """Tokens of all requests, so many of them together."""
    config = tiny_gpu.get_config()
    engine = dataclasses.replace(
        config.engine,
        prefill_tokens=largest,
        step_rows=shapes,
        context_tokens=CONTEXT,
        step_deadline_ms=60_000,
    )
    cluster = ClusterConfig(ranks=1, slots_per_rank=MODEL.experts)
    config = dataclasses.replace(config, model=MODEL, cluster=cluster, engine=engine)
    assert attends_by_items(config)
    rank, found, left = GpuEngine(config).begin(), {}, requests()
    try:
        while left:
            for request in left[:at_once]:
                rank.engines[0].add(request)
            left = left[at_once:]
            found |= rank.serve()
    finally:
        rank.close()
    return found


def test_tokens_do_not_depend_on_the_shapes_of_steps_nor_on_what_is_beside_them():
    wanted = answers(64, (), at_once=1)
    assert all(len(tokens) == NEW for tokens in wanted.values())
    assert len(set(wanted.values())) > len(wanted) // 2, "all alike would show nothing"
    found = answers(512, (32, 160), at_once=len(LENGTHS))
    assert found == wanted
