"""Every absl flag of serving, and how flags become a RunConfig."""

import copy
import dataclasses
import importlib
import os
import pathlib
import sys
import types
import typing

from absl import flags

from eep_jax.config import DeviceConfig, RunConfig
from eep_jax.errors import CheckpointError
from eep_jax.storage.manifest import read_model
from launch.environments.environment import Address, Environment, Identity
from launch.environments.local import LocalEnvironment, parse_gpus, visible_gpus
from launch.environments.slurm import SlurmEnvironment
from launch.errors import UsageError

CONFIG = flags.DEFINE_string(
    "config", "tiny_cpu", "A file of configs/ without .py, such as tiny_cpu."
)
OVERRIDE = flags.DEFINE_multi_string(
    "override",
    [],
    "Replaces one value of the configuration: cluster.policy=degrade. May be repeated.",
)
CHECKPOINT = flags.DEFINE_string(
    "checkpoint",
    None,
    "Directory of weights, of launch.convert or of Hugging Face. The model is the one in it.",
)
RANDOM_WEIGHTS = flags.DEFINE_boolean(
    "random_weights",
    False,
    "Serve the configured model with weights that are drawn on the device, from --random_seed.",
)
RANDOM_SEED = flags.DEFINE_integer("random_seed", 0, "Seed of --random_weights.", 0)
RUN_DIR = flags.DEFINE_string(
    "run_dir",
    None,
    "Journal, logs, token and endpoint of this run. Default: a new temporary directory.",
)
HOST = flags.DEFINE_string("host", None, "Address the HTTP API listens on.")
PORT = flags.DEFINE_integer("port", None, "Port of the HTTP API; 0 takes any free one.", 0, 65535)
ENVIRONMENT = flags.DEFINE_enum(
    "environment",
    "local",
    ["local", "slurm"],
    "What says who a process is and where the supervisor is: flags and the run directory, or the "
    "variables of a SLURM job.",
)
RANK = flags.DEFINE_integer("rank", None, "Which rank this process is.", 0)
TASK_RANKS = flags.DEFINE_list(
    "task_ranks", [], "The ranks of a SLURM step's tasks, in their order: 2,5. Default: 0,1,2..."
)
LOCAL_RANK = flags.DEFINE_integer(
    "local_rank", None, "Which of its node's ranks this process is; chooses its GPU.", 0
)
LOCAL_RANKS = flags.DEFINE_integer("local_ranks", None, "How many ranks its node has.", 1)
GPUS = flags.DEFINE_string(
    "gpus",
    None,
    "GPUs the ranks go around, as CUDA_VISIBLE_DEVICES names them: 0,1. Default: those of that "
    "variable, else all of this machine.",
)
DEVICE_MEMORY_FRACTION = flags.DEFINE_float(
    "device_memory_fraction",
    None,
    "Part of a GPU's memory that JAX takes in all ranks on it; the heap needs the rest.",
)
SUPERVISOR = flags.DEFINE_string(
    "supervisor",
    "",
    "HOST:PORT of the supervisor's control channel: it listens there, and hosts that do not share "
    "its run directory call there.",
)
MIRROR_HOST = flags.DEFINE_string(
    "mirror_host",
    None,
    "Address of this host at which ranks of other hosts reach its ranks; auto: the one from which "
    "it reaches the supervisor. Needed on every host, as soon as there are two.",
)
HOST_ID = flags.DEFINE_string(
    "host_id",
    "",
    "Name of this host, if not the operating system's own: parts of one machine with different "
    "names count as several hosts.",
)
PARENT_PID = flags.DEFINE_integer("parent_pid", 0, "End when this process, the parent, ends.", 0)

TOKEN_VARIABLE = "EEP_TOKEN"
TOKEN_FILE = "token"
EXIT_USAGE = 2
RENAMED = {"batch_slots": "batch_rows"}  # fields of configurations, by the name they had before


def run_config() -> RunConfig:
    """The configuration that the flags name. Raises UsageError."""
    config = override(_with_weights(load_config(CONFIG.value)), *OVERRIDE.value)
    serve_flags = (("host", HOST), ("port", PORT), ("mirror_host", MIRROR_HOST))
    for name, value in ((name, flag.value) for name, flag in serve_flags):
        if value is not None:
            config = dataclasses.replace(
                config, serve=dataclasses.replace(config.serve, **{name: value})
            )
    if DEVICE_MEMORY_FRACTION.value is not None:
        try:
            device = DeviceConfig(memory_fraction=DEVICE_MEMORY_FRACTION.value)
        except ValueError as error:
            raise UsageError(f"--device_memory_fraction: {error}") from error
        config = dataclasses.replace(config, device=device)
    return config


def _with_weights(config: RunConfig) -> RunConfig:
    """`config` with the weights that flags name; what does not fit it yet, overrides may mend."""
    if CHECKPOINT.value is not None and RANDOM_WEIGHTS.value:
        raise UsageError("--checkpoint and --random_weights: give one of them")
    if CHECKPOINT.value is not None:
        directory = str(pathlib.Path(CHECKPOINT.value).absolute())
        changes = {"checkpoint": directory, "model": read_model(directory)}
        return _unchecked(config, random_weights=None, **changes)
    if RANDOM_WEIGHTS.value:
        return _unchecked(config, random_weights=RANDOM_SEED.value, checkpoint="")
    return config


def forwarded() -> list[str]:
    """Flags for another process of the same run. GPUs are looked for once, here."""
    arguments = [f"--config={CONFIG.value}", *(f"--override={text}" for text in OVERRIDE.value)]
    if CHECKPOINT.value is not None:
        arguments.append(f"--checkpoint={pathlib.Path(CHECKPOINT.value).absolute()}")
    if RANDOM_WEIGHTS.value:
        arguments += ["--random_weights", f"--random_seed={RANDOM_SEED.value}"]
    if ENVIRONMENT.value != "local":
        arguments.append(f"--environment={ENVIRONMENT.value}")
    optional = (HOST, PORT, DEVICE_MEMORY_FRACTION, MIRROR_HOST)
    arguments += [f"--{flag.name}={flag.value}" for flag in (SUPERVISOR, HOST_ID) if flag.value]
    arguments += [f"--{flag.name}={flag.value}" for flag in optional if flag.value is not None]
    return arguments + ([f"--gpus={','.join(gpus())}"] if run_config().platform == "gpu" else [])


def environment() -> Environment:
    """What the flag says. Raises UsageError for --task_ranks that are none."""
    if ENVIRONMENT.value == "local":
        return LocalEnvironment()
    if not all(text.isdecimal() for text in TASK_RANKS.value):
        raise UsageError(f"--task_ranks={','.join(TASK_RANKS.value)} must be ranks, such as 2,5")
    return SlurmEnvironment(os.environ, tuple(map(int, TASK_RANKS.value)))


def identity(config: RunConfig) -> Identity:
    """Which rank of the run this process is. Raises UsageError."""
    given = (RANK.value, LOCAL_RANK.value, LOCAL_RANKS.value)
    return environment().identity(config.cluster.ranks, *given)


def supervisor_address(config: RunConfig) -> Address | None:
    """Where the control channel is; None: the run directory says. Raises UsageError."""
    return environment().supervisor(SUPERVISOR.value, config.serve.control_port)


def gpus() -> tuple[str, ...]:
    """The GPUs that ranks go around. Raises UsageError where there is none."""
    found = visible_gpus() if GPUS.value is None else parse_gpus(GPUS.value)
    if not found:
        raise UsageError(
            "platform gpu, but no NVIDIA GPU was found by "
            + (f"--gpus={GPUS.value!r}" if GPUS.value is not None else _where_gpus_come_from())
            + "; name them with --gpus=0,1, or take a configuration of platform cpu"
        )
    return found


def _where_gpus_come_from() -> str:
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return "nvidia-smi -L" if named is None else f"CUDA_VISIBLE_DEVICES={named!r}"


def load_config(name: str) -> RunConfig:
    """`get_config()` of `configs/<name>.py`. Raises UsageError naming those there are."""
    import configs

    known = sorted(
        p.stem for p in pathlib.Path(configs.__path__[0]).glob("*.py") if p.stem[0] != "_"
    )
    if name not in known:
        raise UsageError(f"--config={name!r} is not one of {known}")
    return importlib.import_module(f"configs.{name}").get_config()


def override(config: RunConfig, *texts: str) -> RunConfig:
    """`config` with values replaced: `engine.combine=per_rank`, `name=try`.

    Whether the parts fit each other is checked at the end: two values may have to change together.
    Raises UsageError for an unknown name, a value of a wrong type, or one that the config refuses.
    """
    for text in texts:
        path, equals, value = text.partition("=")
        if not equals:
            raise UsageError(f"--override={text!r} must be of the form part.name=value")
        try:
            # Of the whole, only the part is checked.
            config = _unchecked(config, **_change(config, path.split("."), value))
        except ValueError as error:
            raise UsageError(f"--override={text!r}: {error}") from error
    try:
        return dataclasses.replace(config)
    except ValueError as error:
        given = " ".join(f"--override={text!r}" for text in texts)
        raise UsageError(f"{given or '--config=' + config.name}: {error}") from error


def _unchecked(config: RunConfig, **changes) -> RunConfig:
    """A copy that nobody has checked yet."""
    found = copy.copy(config)
    for name, value in changes.items():
        object.__setattr__(found, name, value)
    return found


def _change(config, path: list[str], text: str) -> dict:
    """`{name: value}`, which replaced in `config` has `text` at `path`."""
    name, rest = path[0], path[1:]
    hints = typing.get_type_hints(type(config))
    if name not in hints:
        if name in RENAMED:
            raise ValueError(f"{name} is now called {RENAMED[name]}; give that name instead")
        raise ValueError(f"{type(config).__name__} has no {name!r}, only {sorted(hints)}")
    if not rest:
        return {name: _parse(name, hints[name], text)}
    inner = getattr(config, name)
    return {name: dataclasses.replace(inner, **_change(inner, rest, text))}


def _parse(name: str, kind: type, text: str):
    if dataclasses.is_dataclass(kind):
        raise ValueError(f"{name} has parts: {sorted(typing.get_type_hints(kind))}")
    if isinstance(kind, types.UnionType):  # `int | None`
        if text in ("", "None"):
            return None
        (kind,) = set(typing.get_args(kind)) - {types.NoneType}
    if typing.get_origin(kind) is tuple:  # `tuple[str, ...]`
        parts = (part.strip(" ()'\"") for part in text.split(","))
        return tuple(typing.get_args(kind)[0](part) for part in parts if part)
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError(f"{name} is {text!r}, must be true or false")
        return text.lower() == "true"
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"{name} is {text!r}, must be of type {kind.__name__}") from None


def read_token(run_dir: pathlib.Path) -> str:
    """The control channel's token, from the environment or the run directory; never from a flag."""
    token = os.environ.get(TOKEN_VARIABLE) or ""
    if not token:
        try:
            token = (run_dir / TOKEN_FILE).read_text().strip()
        except OSError as error:
            raise UsageError(
                f"no token: set {TOKEN_VARIABLE} or write {run_dir / TOKEN_FILE} ({error.strerror})"
            ) from error
    if len(token) < 16:
        raise UsageError(f"the token has {len(token)} characters, at least 16 are needed")
    return token


def required_run_dir() -> pathlib.Path:
    """--run_dir as a directory that exists. Raises UsageError."""
    if not RUN_DIR.value or not pathlib.Path(RUN_DIR.value).is_dir():
        raise UsageError(f"--run_dir={RUN_DIR.value!r} must name the directory of a run")
    return pathlib.Path(RUN_DIR.value).absolute()


def main_with_usage(main):
    """`main` as absl runs it, with errors of usage as one line and exit status 2."""

    def wrapped(arguments: list[str]):
        if len(arguments) > 1:
            print(f"unexpected arguments {arguments[1:]}; options begin with --", file=sys.stderr)
            return EXIT_USAGE
        try:
            return main()
        except (UsageError, CheckpointError) as error:
            print(f"error: {error}", file=sys.stderr)
            return EXIT_USAGE

    return wrapped
