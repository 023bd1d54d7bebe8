"""Run-time checks of all annotations of the two packages, installed before they are imported.

Modules that annotate arrays are checked by jaxtyping, which compares shapes across the arguments of
a call; all others by beartype alone, which costs a twentieth of that.
"""

import pathlib

import beartype
import beartype.claw
import jaxtyping

ROOT = pathlib.Path(__file__).parent.parent.parent
PACKAGES = ("eep_jax", "pallas_kernels")
# Not checked yet, except for CHECKED; both are to go.
UNCHECKED = ("pallas_kernels",)
CHECKED = tuple(f"pallas_kernels.{m}" for m in ("dispatch.api", "combine.api", "expert_gemm.host"))
# An int is accepted for a float, as by static checkers; the same items are checked in every run.
CHECKER = "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True, is_random=False))"


def modules_with_shapes() -> list[str]:
    """Names of the modules that annotate arrays."""
    paths = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    shaped = [path for path in paths if "from jaxtyping import" in path.read_text("utf-8")]
    names = sorted(".".join(path.relative_to(ROOT).with_suffix("").parts) for path in shaped)
    return [name for name in names if name in CHECKED or not name.startswith(UNCHECKED)]


def install() -> None:
    """Has every module of PACKAGES checked that is imported from now on."""
    conf = beartype.BeartypeConf(
        is_pep484_tower=True,
        is_random=False,
        claw_is_pep526=False,
        claw_skip_package_names=UNCHECKED,
        claw_decor_place_func=beartype.BeartypeDecorPlace.FIRST,  # beneath jax.jit
    )
    beartype.claw.beartype_packages(PACKAGES, conf=conf)
    jaxtyping.install_import_hook(modules_with_shapes(), CHECKER)
