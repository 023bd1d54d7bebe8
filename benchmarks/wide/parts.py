"""What `multi_gpu` runs on a machine, for how long at most, and where records go."""

import dataclasses
import pathlib

from benchmarks.processes import Machine
from benchmarks.wide.plans import plans_of
from benchmarks.wide.running import Part
from eep_jax.models.memory import expert_bytes
from launch.flags import load_config


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What differs between a run that measures and one that shows that all works."""

    tokens: str
    batches: str
    samples: int
    layers: int  # of the stacks that are decoded, 0: all or as many as fit
    kills: int
    load: tuple[str, ...]  # flags of the recovery benchmarks


MEASURING = Sizes(
    tokens="1,4,16,64,128,256,512,1024,2048,4096",
    batches="1,16,64,256",
    samples=30,
    layers=16,
    kills=12,
    load=("--concurrency=32", "--output_len=256", "--before_s=6", "--after_s=8"),
)
SMALL = Sizes(
    tokens="4,16",
    batches="8",
    samples=4,
    layers=3,
    kills=2,
    load=("--concurrency=6", "--output_len=48", "--before_s=1", "--after_s=1"),
)


def parts_of(machine: Machine, directory: pathlib.Path, small: bool) -> list[Part]:
    """All parts for this machine, in the order in which they are worth most.

    `small` shows in little time that all of it runs: on CPU, and where ranks share a GPU.
    """
    sizes = SMALL if small else MEASURING
    found = []
    if machine.platform == "gpu":
        found += _correct(machine, sizes)
    found += _exchange(machine, directory, sizes, small)
    found += _decode(machine, directory, sizes, small)
    if machine.ranks > 1:
        found.append(_relocation(machine, directory, sizes))
        found += _recovery(machine, directory, sizes, small)
    if machine.platform == "gpu" and not small:
        found.append(_sources(machine, directory, sizes))
    if machine.ranks >= 4:
        found += _chained(machine, directory, sizes, small)
    return found if small else [*found, *_long(machine, directory, sizes)]


def _gpus(machine: Machine) -> tuple[str, ...]:
    return (f"--gpus={','.join(machine.gpus)}",) if machine.gpus else ()


def _ranks(machine: Machine) -> tuple[str, ...]:
    return (f"--ranks={machine.ranks}", *_gpus(machine))


def _out(directory: pathlib.Path, name: str) -> str:
    return f"--out={directory / name}.jsonl"


def _correct(machine: Machine, sizes: Sizes) -> list[Part]:
    tests = ("tests/gpu/test_killed_processes.py", "tests/gpu/test_cuda_heap.py::TestProcesses")
    variables = (
        ("EEP_TEST_PLATFORM", "gpu"),
        ("EEP_GPU_KILLS", str(sizes.kills)),
        ("EEP_GPU_RANKS", str(max(2, machine.ranks))),
        ("EEP_TEST_GPUS", ",".join(machine.gpus)),
    )
    command = ("pytest", "-q", "-x", "-s", "-p", "no:cacheprovider", *tests)
    return [Part("correct", "correct", command, 240.0, variables)]


def _exchange(machine: Machine, directory: pathlib.Path, sizes: Sizes, small: bool) -> list[Part]:
    platform = (f"--platform={machine.platform}",)
    shapes = ("--hidden=64", "--experts=16", "--top_k=4") if machine.platform == "cpu" else ()
    common = (*platform, *_ranks(machine), *shapes, f"--samples={sizes.samples}")
    command = ("benchmarks.bench_wide", *common, f"--tokens={sizes.tokens}")
    command += (_out(directory, "exchange"), f"--directory={directory / 'exchange'}")
    limit_s = 120.0 if small else 300.0
    return [Part("exchange", "exchange", (*command, f"--deadline_s={limit_s - 15:.0f}"), limit_s)]


def _decode(machine: Machine, directory: pathlib.Path, sizes: Sizes, small: bool) -> list[Part]:
    """Layers of Qwen3-30B-A3B; of larger models, as many as fit, where there are more GPUs."""
    if machine.platform == "cpu":
        return [_decoding(machine, directory, sizes, "decode", "tiny_cpu", 60.0)]
    q30 = "qwen3_30b_a3b_h200x2"
    if small:
        small_moe = "small_moe_h100x1"
        return [_decoding(machine, directory, sizes, "decode", small_moe, 150.0)]
    found = [_decoding(machine, directory, sizes, "decode", q30, 300.0)]
    if machine.ranks >= 4:
        fits = dataclasses.replace(sizes, batches="64,128", layers=0)
        for name, config in (
            ("decode_deepseek", "deepseek_v3_h200x32"),
            ("decode_235b", "qwen3_235b_a22b_h200x8"),
        ):
            found.append(_decoding(machine, directory, fits, name, config, 240.0))
    return found


def _long(machine: Machine, directory: pathlib.Path, sizes: Sizes) -> list[Part]:
    """The whole model at every batch; and fewer ranks of the same machine, for scaling."""
    q30, found = "qwen3_30b_a3b_h200x2", []
    for ranks in (r for r in (1, 2, 4) if r < machine.ranks):
        fewer = Machine("gpu", ranks, machine.gpus[:ranks])
        one = dataclasses.replace(sizes, batches="64")
        name = f"scaling_{ranks}"
        found.append(_decoding(fewer, directory, one, name, q30, 120.0, ("--systems=live",)))
    whole = dataclasses.replace(sizes, layers=0, batches="64,16,256,1")
    return [*found, _decoding(machine, directory, whole, "whole", q30, 420.0)]


def _decoding(
    machine: Machine,
    directory: pathlib.Path,
    sizes: Sizes,
    name: str,
    config: str,
    limit_s: float,
    more: tuple[str, ...] = (),
) -> Part:
    command = ("benchmarks.bench_wide_decode", f"--platform={machine.platform}", *_ranks(machine))
    command += (f"--config={config}", f"--batches={sizes.batches}", f"--layers={sizes.layers}")
    command += (
        f"--samples={max(2, sizes.samples // 3)}",
        f"--deadline_s={limit_s - 15:.0f}",
        *more,
    )
    command += (_out(directory, name), f"--directory={directory / name}")
    return Part(name.partition("_")[0], name, command, limit_s)


def _recovery(machine: Machine, directory: pathlib.Path, sizes: Sizes, small: bool) -> list[Part]:
    cpu = machine.platform == "cpu"
    config = "tiny_cpu" if cpu else "tiny_gpu" if small else "small_moe_h100x1"
    common = ("benchmarks.bench_faults", f"--config={config}", *_ranks(machine), *sizes.load)
    # NCCL cannot put two ranks on one GPU, so there is no static sharding to restart there.
    systems = "elastic" if cpu or machine.link == "shared_gpu" else "elastic,rejit,restart"
    limit_s = 150.0 if small else 330.0
    command = (*common, f"--systems={systems}", _out(directory, "recovery"))
    found = [Part("recovery", "recovery", command, limit_s)]
    once = ("--override=cluster.redundancy=1", "--override=cluster.sources=local,peer,backup")
    # Memory of all ranks together for each expert once, and one more under way.
    own = -(-experts_of(config) // machine.ranks) + 2
    room = own * (expert_bytes(load_config(config)) + (1 << 20))
    # The survivors have slots for all experts, of which each is on one rank alone.
    slots = -(-experts_of(config) // (machine.ranks - 1)) + 1
    once += (f"--override=cluster.ranks={machine.ranks}",)
    once += (f"--override=cluster.slots_per_rank={slots}",)
    once += (f"--override=cluster.backup_bytes={room}", "--systems=elastic", "--await_backups")
    found.append(Part("recovery", "backup", (*common, *once, _out(directory, "backup")), 200.0))
    return found


def _relocation(machine: Machine, directory: pathlib.Path, sizes: Sizes) -> Part:
    """Experts from another GPU."""
    config = "tiny_cpu" if machine.platform == "cpu" else "small_moe_h100x1"
    command = ("benchmarks.bench_wide_sources", f"--platform={machine.platform}", *_gpus(machine))
    command += (f"--config={config}", f"--samples={sizes.samples // 3 + 1}", "--deadline_s=90")
    return Part("recovery", "relocation", (*command, _out(directory, "relocation")), 100.0)


def _sources(machine: Machine, directory: pathlib.Path, sizes: Sizes) -> Part:
    """Experts from host memory and storage, on one GPU."""
    command = ("benchmarks.bench_sources", "--config=small_moe_h100x1", *_gpus(machine))
    command += (f"--samples={sizes.samples // 3 + 1}", _out(directory, "sources"))
    return Part("recovery", "sources", command, 150.0)


def _chained(machine: Machine, directory: pathlib.Path, sizes: Sizes, small: bool) -> list[Part]:
    """Kills of several ranks at once, and one after the other; then all are back."""
    config = (
        "tiny_cpu" if machine.platform == "cpu" else "tiny_gpu" if small else "small_moe_h100x1"
    )
    found = []
    for name, plan in plans_of(machine.ranks).items():
        command = ("benchmarks.serve", f"--config={config}", *overrides_of(config, machine.ranks))
        command += _gpus(machine)
        command += (f"--fault_plan={plan}", f"--concurrency={8 if small else 48}")
        command += (f"--phase_s={3 if small else 6}", _out(directory, name))
        # Each run compiles the same: on GPUs the first one keeps it for the others.
        cache = (("JAX_COMPILATION_CACHE_DIR", str(directory / "compile_cache")),)
        found.append(Part("chained", name, command, 240.0, cache if machine.gpus else ()))
    return found


def experts_of(config: str) -> int:
    """Of a file of configs/."""
    return load_config(config).model.experts


def overrides_of(config: str, ranks: int) -> tuple[str, ...]:
    """So many ranks, and slots for every expert on a quarter of them: 1, 2 and 4 of 8 may die."""
    experts = experts_of(config)
    slots = max(-(-2 * experts // ranks), -(-experts // max(1, ranks // 4)))
    return (
        f"--override=cluster.ranks={ranks}",
        f"--override=cluster.slots_per_rank={slots}",
        "--override=cluster.redundancy=2",
    )
