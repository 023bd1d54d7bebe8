"""Promises of the private names of JAX: one file has them, and they work with this version."""

import ast
import inspect
import pathlib
import pickle

import jax
import numpy as np
import pytest
from jax.experimental.buffer_callback import buffer_callback

from eep_jax import jax_internals

ROOT = pathlib.Path(__file__).parents[2]
# Kernels need MLIR's dialects, which JAX hands out by a private module only.
MAY_BE_PRIVATE = {
    "eep_jax/jax_internals.py",
    "pallas_kernels/simt/mlir.py",
}
DOCUMENTED = {"_exit", "_fields", "_replace"}  # of os, and of named tuples
SOURCES = [
    path.relative_to(ROOT).as_posix()
    for folder in ("eep_jax", "pallas_kernels", "launch", "configs", "benchmarks")
    for path in sorted((ROOT / folder).rglob("*.py"))
]


class Doubled:
    """The callee of a `buffer_callback`: pickled by name."""

    def __call__(self, context, out, x) -> None:
        np.asarray(out)[...] = 2 * np.asarray(x)


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def names_defined(tree: ast.Module) -> set[str]:
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    found = {node.name for node in ast.walk(tree) if isinstance(node, kinds)}
    stored = [n for n in ast.walk(tree) if isinstance(getattr(n, "ctx", None), ast.Store)]
    return found | {
        n.attr if isinstance(n, ast.Attribute) else getattr(n, "id", "") for n in stored
    }


def private_access(tree: ast.Module, own: set[str]) -> list[str]:
    """Private modules that are imported, and private attributes that are none of our `own`."""
    found = []
    for node in ast.walk(tree):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        found += [m for m in modules if any(is_private(part) for part in m.split("."))]
        if isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr not in own:
            found.append(ast.unparse(node))
    return found


def test_private_names_are_used_in_one_file_only():
    trees = {name: ast.parse((ROOT / name).read_text()) for name in SOURCES}
    own = set().union(*map(names_defined, trees.values())) | DOCUMENTED
    users = {name: found for name, tree in trees.items() if (found := private_access(tree, own))}
    wrong = {name: found for name, found in users.items() if name not in MAY_BE_PRIVATE}
    assert not wrong, "move them to eep_jax/jax_internals.py"
    assert "eep_jax/jax_internals.py" in users


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import jax._src.core", ["jax._src.core"]),
        ("from jax._src import core", ["jax._src"]),
        ("compiled._executable.run()", ["compiled._executable"]),
        ("class A:\n  def _f(self): self._f()\n  def h(self, other): other._f()", []),
        ("import jax\njax.__version__", []),
    ],
)
def test_private_access_is_found(source, found):
    tree = ast.parse(source)
    assert private_access(tree, names_defined(tree)) == found


def test_the_installed_version_was_checked():
    assert jax.__version__ in jax_internals.CHECKED_WITH, (
        "run tests/eep_jax, then add the version to jax_internals.CHECKED_WITH"
    )


@pytest.mark.parametrize("calls_back", [False, True])
def test_an_executable_is_loaded_with_its_callbacks(calls_back):
    x = np.arange(4, dtype=np.float32)
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    double = buffer_callback(Doubled(), shape) if calls_back else lambda x: x * 2
    compiled = jax.jit(lambda x: double(x) + 1).lower(x).compile()
    payload = pickle.loads(pickle.dumps(jax_internals.payload_of_executable(compiled)))
    assert len(payload["callbacks"]) == calls_back
    in_tree, out_tree = jax.tree.structure(((x,), {})), jax.tree.structure(0)
    loaded = jax_internals.executable_from_payload(payload, in_tree, out_tree)
    for _ in range(2):
        np.testing.assert_array_equal(loaded(x), 2 * x + 1)
    np.testing.assert_array_equal(compiled(x), 2 * x + 1, "it still works itself")


def test_attention_of_cudnn_has_the_parameters_that_are_passed():
    attention = jax_internals.cudnn_attention
    dense = inspect.signature(attention.dot_product_attention).parameters
    paged = inspect.signature(attention.paged_attention).parameters
    assert {"q_seqlen", "kv_seqlen", "scale", "mask_type", "return_residual"} <= set(dense)
    assert {"scale", "mask_type", "return_residual"} <= set(paged)
    positional = ["query", "key", "value", "q_seqlen", "kv_seqlen"]
    positional += ["page_table_k", "page_table_v"]
    assert list(paged)[:7] == positional
    assert attention.MaskType.PADDING is not None
