"""All absl flags of serving, and their conversion into a RunConfig."""

import os
import pathlib

from absl import flags

from eep_jax.config import RunConfig
from eep_jax.errors import RunDirError
from eep_jax.runtime.control.run_dir import TOKEN_CHARACTERS_MIN, check_run_dir
from eep_jax.runtime.control.run_dir import read_token as run_dir_token
from eep_jax.storage.manifest import read_model
from launch import program
from launch.config_files import Draft, load_config, override  # noqa: F401
from launch.environments.environment import Address, Environment, Identity
from launch.environments.local import LocalEnvironment, parse_gpus, visible_gpus
from launch.environments.slurm import SlurmEnvironment
from launch.errors import UsageError

CONFIG = flags.DEFINE_string(
    "config",
    "tiny_cpu",
    "Configuration of the run: a name, such as tiny_cpu, or the path of a .py file that defines "
    "get_config() -> RunConfig.",
)
OVERRIDE = flags.DEFINE_multi_string(
    "override",
    [],
    "Replaces one value of the configuration: --override=cluster.policy=degrade. May be repeated.",
)
CHECKPOINT = flags.DEFINE_string(
    "checkpoint",
    None,
    "Directory of weights, written by launch.convert or from Hugging Face. Its model replaces the "
    "configured one.",
)
RANDOM_WEIGHTS = flags.DEFINE_boolean(
    "random_weights",
    False,
    "Serves the configured model with weights drawn on the device from --random_seed.",
)
RANDOM_SEED = flags.DEFINE_integer("random_seed", 0, "Seed of --random_weights.", 0)
program.group("Configuration", CONFIG, OVERRIDE, CHECKPOINT, RANDOM_WEIGHTS, RANDOM_SEED)

RUN_DIR = flags.DEFINE_string(
    "run_dir",
    None,
    "Directory of the run's journal, logs, token and endpoint. If not given, launch.local and "
    "launch.node make a temporary one.",
)
HOST = flags.DEFINE_string(
    "host", None, "Address the HTTP API listens on. If not given, serve.host of the configuration."
)
PORT = flags.DEFINE_integer(
    "port",
    None,
    "Port of the HTTP API, 0 for any free one. If not given, serve.port of the configuration.",
    0,
    65535,
)
API_KEY_FILE = flags.DEFINE_string(
    "api_key_file",
    None,
    "File of the keys that completions need, one a line; it is read again when it changes. Clients "
    "send `Authorization: Bearer KEY`.",
)
ADMIN_KEY_FILE = flags.DEFINE_string(
    "admin_key_file",
    None,
    "File of the keys that the status and changes of the cluster need, which may also ask for "
    "completions.",
)
ALLOWED_HOSTS = flags.DEFINE_list(
    "allowed_hosts",
    None,
    "Further names by which clients reach this service, behind a proxy for example: "
    "api.example.org,eep.default.svc.",
)
SHUTDOWN_TIMEOUT_S = flags.DEFINE_float(
    "shutdown_timeout_s",
    None,
    "Seconds for running requests to finish after SIGTERM or Ctrl-C; a second one waits for none. "
    "If not given, serve.shutdown_timeout_s of the configuration.",
    0,
)
SERVED_MODEL_NAME = flags.DEFINE_string(
    "served_model_name",
    None,
    "Name of the model in requests and answers. If not given, the model's own.",
)
CORS_ORIGINS = flags.DEFINE_list(
    "cors_origins",
    None,
    "Origins whose pages a browser lets read answers: https://a.example,https://b.example; * for "
    "all. If not given, serve.cors_origins of the configuration.",
)
ACCESS_LOG = flags.DEFINE_boolean(
    "access_log", None, "Logs a line for every HTTP request. If not given, serve.access_log."
)
PARENT_PID = flags.DEFINE_integer(
    "parent_pid", 0, "Ends this process when its parent, which has this pid, ends; 0: does not."
)
program.group("Process", RUN_DIR, HOST, PORT, SHUTDOWN_TIMEOUT_S, PARENT_PID)
program.group("HTTP API", SERVED_MODEL_NAME, CORS_ORIGINS, ACCESS_LOG)
program.group("Who may call", API_KEY_FILE, ADMIN_KEY_FILE, ALLOWED_HOSTS)

ENVIRONMENT = flags.DEFINE_enum(
    "environment",
    "local",
    ["local", "slurm"],
    "Source of the process's rank and of the supervisor's address: flags and the run directory, "
    "or the variables of a SLURM job.",
)
RANK = flags.DEFINE_integer("rank", None, "Rank of this process.", 0)
TASK_RANKS = flags.DEFINE_list(
    "task_ranks",
    [],
    "Ranks of a SLURM step's tasks, in task order: 2,5. If not given: 0,1,2...",
)
LOCAL_RANK = flags.DEFINE_integer(
    "local_rank", None, "Index of this rank among those of its node; selects its GPU.", 0
)
LOCAL_RANKS = flags.DEFINE_integer("local_ranks", None, "Number of ranks on this node.", 1)
program.group("Rank of the process", ENVIRONMENT, RANK, TASK_RANKS, LOCAL_RANK, LOCAL_RANKS)

GPUS = flags.DEFINE_string(
    "gpus",
    None,
    "GPUs that ranks are assigned to in turn, named as in CUDA_VISIBLE_DEVICES: 0,1. If not "
    "given, those of that variable, else all of this machine.",
)
DEVICE_MEMORY_FRACTION = flags.DEFINE_float(
    "device_memory_fraction",
    None,
    "Part of a GPU's memory for JAX, shared by all ranks on it; the heap needs the rest. If not "
    "given, device.memory_fraction of the configuration.",
)
program.group("GPUs", GPUS, DEVICE_MEMORY_FRACTION)

SUPERVISOR = flags.DEFINE_string(
    "supervisor",
    "",
    "HOST:PORT of the supervisor's control channel: the supervisor listens there, and hosts that "
    "do not share its run directory connect there.",
)
MIRROR_HOST = flags.DEFINE_string(
    "mirror_host",
    None,
    "Address of this host for ranks of other hosts; auto: the address of its route to the "
    "supervisor. Required on every host of a run on several hosts.",
)
HOST_ID = flags.DEFINE_string(
    "host_id",
    "",
    "Name of this host in place of the operating system's: processes of one machine with "
    "different names count as different hosts.",
)
program.group("Several hosts", SUPERVISOR, MIRROR_HOST, HOST_ID)

TOKEN_VARIABLE = "EEP_TOKEN"


def run_config() -> RunConfig:
    """The configuration that the flags name.

    Raises:
        UsageError: A flag or a value does not fit; the message names it and the way out.
        CheckpointError: --checkpoint is not the directory of a model.
    """
    draft = Draft(load_config(CONFIG.value))
    if CHECKPOINT.value is not None and RANDOM_WEIGHTS.value:
        raise UsageError("--checkpoint and --random_weights: give one of them")
    if CHECKPOINT.value is not None:
        directory = str(pathlib.Path(CHECKPOINT.value).absolute())
        draft.set(checkpoint=directory, model=read_model(directory), random_weights=None)
    if RANDOM_WEIGHTS.value:
        draft.set(random_weights=RANDOM_SEED.value, checkpoint="")
    for text in OVERRIDE.value:
        draft.override(text)
    for flag, path in (
        (HOST, "serve.host"),
        (PORT, "serve.port"),
        (SHUTDOWN_TIMEOUT_S, "serve.shutdown_timeout_s"),
        (SERVED_MODEL_NAME, "serve.served_model_name"),
        (ACCESS_LOG, "serve.access_log"),
        (MIRROR_HOST, "serve.mirror_host"),
        (DEVICE_MEMORY_FRACTION, "device.memory_fraction"),
    ):
        if flag.value is not None:
            draft.set(f"--{flag.name}", **{path: flag.value})
    if CORS_ORIGINS.value is not None:
        draft.set("--cors_origins", **{"serve.cors_origins": tuple(CORS_ORIGINS.value)})
    for flag, path in (
        (API_KEY_FILE, "serve.api_key_file"),
        (ADMIN_KEY_FILE, "serve.admin_key_file"),
    ):
        if flag.value is not None:
            file = str(pathlib.Path(flag.value).absolute()) if flag.value else ""
            draft.set(f"--{flag.name}", **{path: file})
    if ALLOWED_HOSTS.value is not None:
        draft.set("--allowed_hosts", **{"serve.allowed_hosts": tuple(ALLOWED_HOSTS.value)})
    return draft.checked()


def forwarded() -> list[str]:
    """Flags for another process of the same run, which does not look for GPUs again."""
    arguments = [f"--config={_config_word()}", *(f"--override={text}" for text in OVERRIDE.value)]
    if CHECKPOINT.value is not None:
        arguments.append(f"--checkpoint={pathlib.Path(CHECKPOINT.value).absolute()}")
    if RANDOM_WEIGHTS.value:
        arguments += ["--random_weights", f"--random_seed={RANDOM_SEED.value}"]
    if ENVIRONMENT.value != "local":
        arguments.append(f"--environment={ENVIRONMENT.value}")
    optional = (HOST, PORT, SHUTDOWN_TIMEOUT_S, DEVICE_MEMORY_FRACTION, MIRROR_HOST)
    optional += (SERVED_MODEL_NAME, ACCESS_LOG)
    if CORS_ORIGINS.value is not None:
        arguments.append(f"--cors_origins={','.join(CORS_ORIGINS.value)}")
    arguments += [f"--{flag.name}={flag.value}" for flag in (SUPERVISOR, HOST_ID) if flag.value]
    arguments += [f"--{flag.name}={flag.value}" for flag in optional if flag.value is not None]
    files = (API_KEY_FILE, ADMIN_KEY_FILE)
    arguments += [f"--{f.name}={pathlib.Path(f.value).absolute()}" for f in files if f.value]
    if ALLOWED_HOSTS.value:
        arguments.append(f"--allowed_hosts={','.join(ALLOWED_HOSTS.value)}")
    return arguments + ([f"--gpus={','.join(gpus())}"] if run_config().platform == "gpu" else [])


def environment() -> Environment:
    """The environment that --environment names. Raises UsageError for a wrong --task_ranks."""
    if ENVIRONMENT.value == "local":
        return LocalEnvironment()
    if not all(text.isdecimal() for text in TASK_RANKS.value):
        raise UsageError(f"--task_ranks={','.join(TASK_RANKS.value)} must be ranks, such as 2,5")
    return SlurmEnvironment(os.environ, tuple(map(int, TASK_RANKS.value)))


def identity(config: RunConfig) -> Identity:
    """Rank and node-local index of this process. Raises UsageError."""
    given = (RANK.value, LOCAL_RANK.value, LOCAL_RANKS.value)
    return environment().identity(config.cluster.ranks, *given)


def supervisor_address(config: RunConfig) -> Address | None:
    """Address of the control channel; None: the run directory has it. Raises UsageError."""
    return environment().supervisor(SUPERVISOR.value, config.serve.control_port)


def gpus() -> tuple[str, ...]:
    """The GPUs that ranks are assigned to in turn. Raises UsageError if there is none."""
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


def _config_word() -> str:
    """--config for a process with another working directory."""
    is_path = CONFIG.value.endswith(".py")
    return str(pathlib.Path(CONFIG.value).absolute()) if is_path else CONFIG.value


def read_token(run_dir: pathlib.Path) -> str:
    """The control channel's token, from the environment or the run directory; never from a flag."""
    token = os.environ.get(TOKEN_VARIABLE) or ""
    if not token:
        try:
            return run_dir_token(run_dir)
        except RunDirError as error:
            raise UsageError(f"{error}; or set {TOKEN_VARIABLE}") from error
    if len(token) < TOKEN_CHARACTERS_MIN:
        raise UsageError(
            f"{TOKEN_VARIABLE} has {len(token)} characters, at least {TOKEN_CHARACTERS_MIN} are "
            "needed"
        )
    return token


def required_run_dir() -> pathlib.Path:
    """--run_dir as a directory that exists. Raises UsageError, or RunDirError if it is not safe."""
    if not RUN_DIR.value or not pathlib.Path(RUN_DIR.value).is_dir():
        raise UsageError(f"--run_dir={RUN_DIR.value!r} must name the directory of a run")
    path = pathlib.Path(RUN_DIR.value).absolute()
    check_run_dir(path)
    return path
