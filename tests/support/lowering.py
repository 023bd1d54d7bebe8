"""Lowering for a GPU that is not here: the input of XLA on an H100."""

import functools
import re

import jax
import numpy as np
from jax.extend.mlir import ir
from jax.interpreters.mlir import make_ir_context

from pallas_kernels.exchange.call import Call
from pallas_kernels.exchange.signals import first_round
from pallas_kernels.window import WindowLayout

H100 = jax.sharding.AbstractMesh(
    (),
    (),
    abstract_device=jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", 132, "gpu"),
)


def on_h100():
    """A context in which programs are traced for an H100."""
    return jax.sharding.use_abstract_mesh(H100)


def lowered(function, *arguments) -> str:
    """The StableHLO of `function` for an H100; arguments are arrays or ShapeDtypeStructs."""
    with on_h100():
        traced = jax.jit(function).trace(*arguments)
        return traced.lower(lowering_platforms=("cuda",)).as_text()


def scopes(function, *arguments) -> tuple[set[str], set[str]]:
    """Names in the debug locations: of the lowered program around the kernels, and inside them."""
    with on_h100():
        traced = jax.jit(function).trace(*arguments)
        program = traced.lower(lowering_platforms=("cuda",)).as_text(debug_info=True)
    inside = "".join(_readable(module, locations=True) for module in _MODULE.findall(program))
    return _scopes(without_kernels(program)), _scopes(inside)


def _scopes(text: str) -> set[str]:
    return {part for path in re.findall(r'loc\("([^"]*)"', text) for part in path.split("/")}


def kernels(text: str) -> list[str]:
    """The Mosaic GPU kernels that a lowered program calls, in their order, as readable MLIR."""
    found = [_readable(module) for module in _MODULE.findall(text)]
    assert len(found) == text.count("custom_call @mosaic_gpu")
    return found


def without_kernels(text: str) -> str:
    """The lowered program around its kernels."""
    return _MODULE.sub("", text)


_MODULE = re.compile(r'kernel_hash = "[^"]*", module = "([^"]*)"')
# JAX 0.11 numbers the kernels of a process, in an attribute that only its dumps use.
_NUMBER = re.compile(r', mosaic_gpu.dump_basename = "[^"]*"')


@functools.lru_cache(maxsize=256)
def _readable(module: str, locations: bool = False) -> str:
    escaped = re.sub(r"\\([0-9A-F]{2})", r"\\x\1", module)
    binary = escaped.encode("latin-1").decode("unicode_escape").encode("latin-1")
    with make_ir_context() as context:
        context.allow_unregistered_dialects = True
        parsed = ir.Module.parse(binary).operation
        return _NUMBER.sub("", parsed.get_asm(enable_debug_info=locations))


def like(shape, dtype) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(tuple(shape), np.dtype(dtype))


def a_layout(ranks=2, tokens=8, choices=4, hidden=128, mode="per_choice", fp8=False):
    """A window of bfloat16 rows, which may travel as fp8."""
    dtypes = {"row_dtype": "bfloat16", "dispatch_dtype": "float8_e4m3fn" if fp8 else ""}
    return WindowLayout(ranks, tokens, choices, hidden, mode, **dtypes)


def a_call(
    ranks: int, *, rank: int = 0, active=None, epoch: int = 1, steps: int = 0, address: int = 0
) -> Call:
    """The call of the exchange `steps` after the epoch's first."""
    return Call(
        rank=np.int32(rank),
        active=np.ones(ranks, np.int32) if active is None else np.asarray(active, np.int32),
        epoch=np.uint32(epoch),
        round=np.uint32(first_round(epoch) + steps),
        deadline_ms=np.uint32(1000 * epoch),
        vote=np.uint32(steps),
        suspicion=np.zeros(ranks, np.int32),
        abort_address=np.array([address, epoch], np.uint32),
    )
