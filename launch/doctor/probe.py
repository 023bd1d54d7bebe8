"""Probe of this machine. Whatever is missing or broken is a finding, not an error.

JAX and the CUDA driver are queried in processes of their own, which may crash or hang.
"""

import contextlib
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys

from eep_jax.config import RunConfig
from eep_jax.heap.cuda.libcuda import GpuFacts
from launch.doctor.machine import OPTIONAL, UNLIMITED, Machine

PACKAGES = (  # dependencies in pyproject.toml, and those of its GPU extras
    "jax",
    "jaxlib",
    "flax",
    "orbax-checkpoint",
    "absl-py",
    "jaxtyping",
    "numpy",
    "ml-dtypes",
    "aiohttp",
    "msgspec",
    "xxhash",
    "tokenizers",
    "jinja2",
    "prometheus-client",
    "rich",
    *OPTIONAL,
)
SLURM_COMMANDS = ("sbatch", "srun", "scontrol")
JAX_DEADLINE_S, COMMAND_DEADLINE_S = 120.0, 20.0
ERROR_CHARS = 400

_ASK_JAX = """
import json, jax
print(json.dumps([jax.default_backend(), jax.local_device_count()]))
"""
_ASK_GPUS = """
import dataclasses, json
from eep_jax.heap.cuda.libcuda import survey
version, gpus = survey()
print(json.dumps([version, [dataclasses.asdict(gpu) for gpu in gpus]]))
"""


def look(config: RunConfig) -> Machine:
    """The facts about this machine that matter for `config`."""
    return Machine(
        python=tuple(sys.version_info[:3]),
        kernel=_kernel(),
        packages={name: _version(name) for name in PACKAGES},
        cpus=len(os.sched_getaffinity(0)),
        memory_bytes=_memory("MemTotal"),
        memory_free_bytes=min(_memory("MemAvailable"), _container_free()),
        shm_free_bytes=_free("/dev/shm") or 0,
        backup_free_bytes=_free(config.cluster.backup_dir),
        open_files=_limit(resource.RLIMIT_NOFILE),
        memlock_bytes=_limit(resource.RLIMIT_MEMLOCK),
        memory_files=_works(lambda: os.close(os.memfd_create("eep-doctor"))),
        pidfds=_works(lambda: os.close(os.pidfd_open(os.getpid()))),
        ports=_ports(config),
        **_jax(),
        **_gpus(),
        **_slurm(),
    )


def _jax() -> dict:
    quiet = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "TF_CPP_MIN_LOG_LEVEL": "2"}
    answer, error = ask(_ASK_JAX, JAX_DEADLINE_S, quiet)
    if error:
        return {"jax_error": error}
    backend, devices = answer
    return {"jax_backend": backend, "jax_devices": devices}


def _gpus() -> dict:
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    answer, error = ask(_ASK_GPUS, COMMAND_DEADLINE_S)
    found = {"driver": driver.partition("\n")[0], "gpu_error": error}
    if not error:
        version, gpus = answer
        fields = [gpu | {k: tuple(gpu[k]) for k in ("capability", "peers")} for gpu in gpus]
        found |= {"cuda": version, "gpus": tuple(GpuFacts(**gpu) for gpu in fields)}
    return found


def _slurm() -> dict:
    found = {name: _output(name, "--version") for name in SLURM_COMMANDS if shutil.which(name)}
    variables = {k: v for k, v in os.environ.items() if k.startswith("SLURM_")}
    error = ""
    if found:
        answered = _run("scontrol", "ping")
        error = "" if answered and answered.returncode == 0 else _message(answered)
    return {"slurm": found, "slurm_error": error, "slurm_variables": variables}


def ask(program: str, deadline_s: float, variables: dict[str, str] | None = None):
    """Runs a Python program: (the JSON in its last line, or None; the error, or '').

    >>> ask("print([1])", 10.0)
    ([1], '')
    """
    try:
        done = subprocess.run(
            [sys.executable, "-c", program],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | (variables or {}),
            capture_output=True,
            text=True,
            errors="replace",
            timeout=deadline_s,
        )
    except subprocess.TimeoutExpired:
        return None, f"no answer within {deadline_s:g} s"
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        return None, f"the process ended by {name}: {done.stderr.strip()[-ERROR_CHARS:]}"
    if done.returncode:
        last = done.stderr.strip().rpartition("\n")[2]
        return None, last[-ERROR_CHARS:] or f"exit status {done.returncode}"
    try:
        return json.loads(done.stdout.strip().rpartition("\n")[2]), ""
    except ValueError:
        return None, f"no answer but {done.stdout[-ERROR_CHARS:]!r}"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _kernel() -> tuple[int, int]:
    match = re.match(r"(\d+)\.(\d+)", platform.release())
    return (int(match[1]), int(match[2])) if match and sys.platform == "linux" else (0, 0)


def _memory(field: str) -> int:
    """Bytes of a line of /proc/meminfo; 0 if it is missing."""
    with contextlib.suppress(OSError):
        match = re.search(rf"{field}:\s+(\d+) kB", pathlib.Path("/proc/meminfo").read_text())
        return int(match[1]) * 1024 if match else 0
    return 0


def _container_free(group: pathlib.Path = pathlib.Path("/sys/fs/cgroup")) -> int:
    """Free memory of this process's control group (version 2); `sys.maxsize` without a limit.

    Files in the page cache count as free, since they can be evicted.
    """
    try:
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
    except (OSError, ValueError):  # no group, or the word "max"
        return sys.maxsize
    with contextlib.suppress(OSError):
        text = (group / "memory.stat").read_text()
        used -= sum(map(int, re.findall(r"^(?:in)?active_file (\d+)$", text, re.MULTILINE)))
    return max(0, limit - used)


def _free(directory: str) -> int | None:
    try:
        return shutil.disk_usage(directory).free
    except OSError:
        return None


def _limit(which: int) -> int:
    soft, _ = resource.getrlimit(which)
    return UNLIMITED if soft == resource.RLIM_INFINITY else soft


def _works(attempt) -> bool:
    try:
        attempt()
    except (OSError, AttributeError):
        return False
    return True


def _ports(config: RunConfig) -> dict[str, str]:
    """For each address that the supervisor would listen on: why it cannot, or ''."""
    serve, found = config.serve, {}
    for host, port in {(serve.host, serve.port), (serve.control_host, serve.control_port)}:
        try:
            kind = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            with socket.socket(kind[0], kind[1]) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(kind[4])
                probe.listen(1)
            found[f"{host}:{port}"] = ""
        except OSError as error:
            found[f"{host}:{port}"] = error.strerror or str(error)
    return found


def _output(*command: str) -> str:
    done = _run(*command)
    return done.stdout.strip() if done and done.returncode == 0 else ""


def _message(done: subprocess.CompletedProcess | None) -> str:
    if done is None:
        return "no answer"
    return (done.stderr or done.stdout).strip().rpartition("\n")[2][-ERROR_CHARS:]


def _run(*command: str) -> subprocess.CompletedProcess | None:
    try:
        return subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=COMMAND_DEADLINE_S
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
