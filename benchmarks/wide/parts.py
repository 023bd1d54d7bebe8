"""Parts of `multi_gpu` for a machine: commands, limits, and files of records."""

import dataclasses
import pathlib

from benchmarks.processes import Machine
from benchmarks.wide.plans import plans_of
from benchmarks.wide.running import Part
from eep_jax.models.memory import expert_bytes
from launch.flags import load_config


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes that differ between a run that measures and one that shows that everything works."""

    tokens: str
    batches: str
    samples: int
    layers: int  # of the stacks that are decoded, 0: all or as many as fit
    kills: int
    load: tuple[str, ...]  # flags of the recovery benchmarks


Q30 = "qwen3_30b_a3b_h200x2"
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


@dataclasses.dataclass(frozen=True)
class Parts:
    """Maker of the parts of one machine, whose records go to files of one directory."""

    machine: Machine
    directory: pathlib.Path
    small: bool

    @property
    def sizes(self) -> Sizes:
        return SMALL if self.small else MEASURING

    @property
    def gpus(self) -> tuple[str, ...]:
        return (f"--gpus={','.join(self.machine.gpus)}",) if self.machine.gpus else ()

    @property
    def ranks(self) -> tuple[str, ...]:
        return (f"--ranks={self.machine.ranks}", *self.gpus)

    @property
    def config(self) -> str:
        """The configuration that is served."""
        if self.machine.platform == "cpu":
            return "tiny_cpu"
        return "tiny_gpu" if self.small else "small_moe_h100x1"

    def part(self, group: str, name: str, limit_s: float, *command: str, variables=()) -> Part:
        """`python -m benchmarks.COMMAND`, with its records in NAME.jsonl."""
        module, *arguments = command
        out = f"--out={self.directory / name}.jsonl"
        return Part(group, name, (f"benchmarks.{module}", *arguments, out), limit_s, variables)

    def wide(self, group: str, name: str, limit_s: float, module: str, *arguments: str) -> Part:
        """A part that starts a process for each rank, in a directory of its own."""
        common = (f"--platform={self.machine.platform}", *self.ranks)
        own = (f"--directory={self.directory / name}", f"--deadline_s={limit_s - 15:.0f}")
        return self.part(group, name, limit_s, module, *common, *arguments, *own)

    def correct(self) -> Part:
        tests = ("tests/gpu/test_killed_processes.py", "tests/gpu/test_cuda_heap.py::TestProcesses")
        variables = (
            ("EEP_TEST_PLATFORM", "gpu"),
            ("EEP_GPU_KILLS", str(self.sizes.kills)),
            ("EEP_GPU_RANKS", str(max(2, self.machine.ranks))),
            ("EEP_TEST_GPUS", ",".join(self.machine.gpus)),
        )
        command = ("pytest", "-q", "-x", "-s", "-p", "no:cacheprovider", *tests)
        return Part("correct", "correct", command, 240.0, variables)

    def exchange(self) -> Part:
        on_cpu = self.machine.platform == "cpu"
        shapes = ("--hidden=64", "--experts=16", "--top_k=4") if on_cpu else ()
        sizes = (f"--samples={self.sizes.samples}", f"--tokens={self.sizes.tokens}")
        limit_s = 120.0 if self.small else 300.0
        return self.wide("exchange", "exchange", limit_s, "bench_wide", *shapes, *sizes)

    def decode(self, name: str, config: str, limit_s: float, *more: str, **sizes) -> Part:
        """Decode steps; `sizes` replace those of the machine, `more` are further flags."""
        s = dataclasses.replace(self.sizes, **sizes)
        words = (f"--config={config}", f"--batches={s.batches}", f"--layers={s.layers}")
        words += (f"--samples={max(2, s.samples // 3)}", *more)
        group = name.partition("_")[0]
        return self.wide(group, name, limit_s, "bench_wide_decode", *words)

    def decodes(self) -> list[Part]:
        """Layers of Qwen3-30B-A3B; of larger models, as many as fit, where there are more GPUs."""
        if self.machine.platform == "cpu":
            return [self.decode("decode", "tiny_cpu", 60.0)]
        if self.small:
            return [self.decode("decode", "small_moe_h100x1", 150.0)]
        larger = {
            "decode_deepseek": "deepseek_v3_h200x32",
            "decode_235b": "qwen3_235b_a22b_h200x8",
        }
        fits = {"batches": "64,128", "layers": 0}
        return [self.decode("decode", Q30, 300.0)] + [
            self.decode(name, config, 240.0, **fits)
            for name, config in larger.items()
            if self.machine.ranks >= 4
        ]

    def relocation(self) -> Part:
        """Experts from another GPU."""
        config = "tiny_cpu" if self.machine.platform == "cpu" else "small_moe_h100x1"
        words = (f"--platform={self.machine.platform}", *self.gpus, f"--config={config}")
        words += (f"--samples={self.sizes.samples // 3 + 1}", "--deadline_s=90")
        return self.part("recovery", "relocation", 100.0, "bench_wide_sources", *words)

    def recovery(self) -> list[Part]:
        """One kill with replicas, and one where experts of the dead rank are in backups alone."""
        machine, experts = self.machine, experts_of(self.config)
        common = ("bench_faults", f"--config={self.config}", *self.ranks, *self.sizes.load)
        # NCCL cannot put two ranks on one GPU, so there is no static sharding to restart there.
        systems = "elastic" if machine.link != "peer" else "elastic,rejit,restart"
        limit_s = 150.0 if self.small else 330.0
        # Memory of all ranks together for each expert once, and one more under way.
        own = -(-experts // machine.ranks) + 2
        room = own * (expert_bytes(load_config(self.config)) + (1 << 20))
        # The survivors have slots for all experts, of which each is on one rank alone.
        slots = -(-experts // (machine.ranks - 1)) + 1
        values = ("redundancy=1", "sources=local,peer,backup", f"ranks={machine.ranks}")
        values += (f"slots_per_rank={slots}", f"backup_bytes={room}")
        once = (*_overrides(*values), "--systems=elastic", "--await_backups")
        return [
            self.part("recovery", "recovery", limit_s, *common, f"--systems={systems}"),
            self.part("recovery", "backup", 200.0, *common, *once),
        ]

    def sources(self) -> Part:
        """Experts from host memory and storage, on one GPU."""
        words = ("--config=small_moe_h100x1", *self.gpus)
        samples = f"--samples={self.sizes.samples // 3 + 1}"
        return self.part("recovery", "sources", 150.0, "bench_sources", *words, samples)

    def chained(self) -> list[Part]:
        """Kills of several ranks at once, and one after the other; then all are back."""
        # Each run compiles the same: on GPUs the first one keeps it for the others.
        cache = (("JAX_COMPILATION_CACHE_DIR", str(self.directory / "compile_cache")),)
        words = (f"--config={self.config}", *overrides_of(self.config, self.machine.ranks))
        words += (*self.gpus, f"--concurrency={8 if self.small else 48}")
        words += (f"--phase_s={3 if self.small else 6}",)
        variables = cache if self.machine.gpus else ()
        return [
            self.part(
                "chained", name, 240.0, "serve", *words, f"--fault_plan={plan}", variables=variables
            )
            for name, plan in plans_of(self.machine.ranks).items()
        ]

    def scaling(self) -> list[Part]:
        """The same batch for each of fewer ranks of the machine."""
        counts = [ranks for ranks in (1, 2, 4) if ranks < self.machine.ranks]
        fewer = {ranks: Machine("gpu", ranks, self.machine.gpus[:ranks]) for ranks in counts}
        return [
            dataclasses.replace(self, machine=machine).decode(
                f"scaling_{ranks}", Q30, 120.0, "--systems=live", batches="64"
            )
            for ranks, machine in fewer.items()
        ]


def parts_of(machine: Machine, directory: pathlib.Path, small: bool) -> list[Part]:
    """All parts for this machine, in the order in which they are worth most.

    `small` shows in little time that all of it runs: on CPU, and where ranks share a GPU.
    """
    parts, gpu = Parts(machine, directory, small), machine.platform == "gpu"
    found = [parts.correct()] if gpu else []
    found += [parts.exchange(), *parts.decodes()]
    if machine.ranks > 1:
        found += [parts.relocation(), *parts.recovery()]
    if gpu and not small:
        found.append(parts.sources())
    if machine.ranks >= 4:
        found += parts.chained()
    if not small:
        whole = parts.decode("whole", Q30, 420.0, layers=0, batches="64,16,256,1")
        found += [*parts.scaling(), whole]
    return found


def experts_of(config: str) -> int:
    """The experts of a file of configs/."""
    return load_config(config).model.experts


def overrides_of(config: str, ranks: int) -> tuple[str, ...]:
    """Flags for `ranks` ranks, a quarter of which have slots for every expert: 4 of 8 may die."""
    experts = experts_of(config)
    slots = max(-(-2 * experts // ranks), -(-experts // max(1, ranks // 4)))
    return _overrides(f"ranks={ranks}", f"slots_per_rank={slots}", "redundancy=2")


def _overrides(*values: str) -> tuple[str, ...]:
    return tuple(f"--override=cluster.{value}" for value in values)
