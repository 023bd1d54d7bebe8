"""Every private name of JAX that the runtime uses, in one file; kernels have their own.

Private names change without notice. `CHECKED_WITH` lists the versions of JAX that
tests/eep_jax/test_jax_internals.py passed with; run it before another one is added.
"""

import inspect
import io
from collections.abc import Callable

import jax
from jax._src.cudnn import fused_attention_stablehlo as cudnn_attention
from jax.experimental import serialize_executable

CHECKED_WITH = ("0.11.2", "0.12.0.1")

__all__ = ["CHECKED_WITH", "cudnn_attention", "executable_from_payload", "payload_of_executable"]

# XLA calls back into Python by number, so the list of callbacks travels beside the executable.
# `jax.experimental.serialize_executable` has no place for it.


def payload_of_executable(compiled: jax.stages.Compiled) -> dict:
    """An executable with its callbacks, as a dict that pickle takes."""
    unloaded = compiled._executable._unloaded_executable
    callbacks = unloaded.host_callbacks
    unloaded.host_callbacks = ()  # they are functions inside functions, which cannot be pickled
    try:
        serialized, _, _ = serialize_executable.serialize(compiled)
    finally:
        unloaded.host_callbacks = callbacks
    return {"executable": serialized, "callbacks": [_describe(c) for c in callbacks]}


def executable_from_payload(payload: dict, in_tree, out_tree) -> jax.stages.Compiled:
    """Loads what `payload_of_executable` returned, for arguments and results of these trees."""
    callbacks = [_callback(*described) for described in payload["callbacks"]]
    if not callbacks:
        return serialize_executable.deserialize_and_load(payload["executable"], in_tree, out_tree)
    backend = jax.devices()[0].client
    unpickler = _Unpickler(io.BytesIO(payload["executable"]), backend)
    unpickler.callbacks = callbacks
    unloaded, arguments, no_kwargs = unpickler.load()
    unloaded.host_callbacks = callbacks
    arguments = in_tree.unflatten(arguments)
    return jax.stages.Compiled(unloaded.load(), [], arguments, out_tree, no_kwargs=no_kwargs)


class _Unpickler(serialize_executable._JaxPjrtUnpickler):
    callbacks = ()

    def persistent_load(self, pid):
        if pid[0] != "exec":
            return super().persistent_load(pid)
        return self.backend.deserialize_executable(
            pid[1], executable_devices=self.execution_devices, host_callbacks=self.callbacks
        )


def _describe(callback: Callable) -> tuple:
    """(object called back, structure of its inputs, of its outputs) of a `buffer_callback`."""
    inside = inspect.getclosurevars(callback).nonlocals
    return inside["callback"], inside["in_tree"], inside["out_tree"]


def _callback(target: Callable, in_tree, out_tree) -> Callable:
    """The function that `buffer_callback` hands to XLA for `target`."""
    inputs = in_tree.num_leaves

    def call(context, *buffers):
        arguments, keywords = jax.tree.unflatten(in_tree, buffers[:inputs])
        outputs = jax.tree.unflatten(out_tree, buffers[inputs:])
        if target(context, outputs, *arguments, **keywords) is not None:
            raise ValueError(f"{type(target).__name__} must not return anything")
        return ()

    return call
