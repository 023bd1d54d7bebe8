"""Store of compiled steps on disk: one process of any rank compiles, all others load.

    <directory>/rows-64-1f0c5a.step   MAGIC, facts as JSON in one line, digest of the rest, the rest
    <directory>/compiling-1f0c5a.lock    held by the process that compiles one

A step does not depend on the rank, so ranks that start together compile each step once, and run
the same code. One process compiles at a time: XLA times kernels on a GPU while it compiles, and
reuses its choice for one step in the next; otherwise a token might have other bits in a prefill
than in a decode step. File names have a digest of the device kind: hosts may share a directory.

A file is loaded only if all its facts equal those of this process: configuration, versions,
device, flags and every source file. Otherwise the step is compiled, and `origins` has the reason.
"""

import contextlib
import fcntl
import functools
import hashlib
import io
import json
import logging
import os
import pathlib
import pickle
import platform
import stat
import time

import jax
import jaxlib

import eep_jax
import pallas_kernels
from eep_jax.config import RunConfig
from eep_jax.jax_internals import executable_from_payload, payload_of_executable
from pallas_kernels.device import prepare_loading

_log = logging.getLogger(__name__)

MAGIC = b"eep-executable/1\n"
FILE_BYTES_MAX = 1 << 30
LINE_BYTES_MAX = 64 << 10
LOADED = "loaded"
TURN_S = 300.0  # how long others may compile before this process does at the same time
POLL_S = 0.02


class UnusableFile(ValueError):
    """A file cannot be loaded, for the reason in the message."""


class ExecutableStore:
    """The steps in `directory`; None keeps nothing. Not thread-safe.

    `origins` has the origin of each step by name: `loaded`, or `compiled: ` and the reason.
    """

    def __init__(self, directory: pathlib.Path | None, facts: dict[str, str]):
        """Steps made under other `facts` are not used."""
        self._directory, self._facts = directory, facts
        self.origins: dict[str, str] = {}

    def obtain(self, name: str, lower, arguments: tuple, result) -> jax.stages.Compiled:
        """The step called `name`, loaded, or compiled from `lower()` and kept for other processes.

        `arguments` are those of a call, by position; `result` is any pytree of the structure of
        what it returns. While another process compiles a step, this one waits, at most TURN_S.
        """
        started, before = time.monotonic(), self._version(name)
        compiled = self._try(name, arguments, result)
        if compiled is None:
            with self._turn(name, before):
                if self._version(name) != before:
                    compiled = self._try(name, arguments, result)
                if compiled is None:
                    compiled = lower().compile()
                    self._keep(name, compiled)
        _log.info("step %s in %.2f s, %s", name, time.monotonic() - started, self.origins[name])
        return compiled

    def _try(self, name: str, arguments: tuple, result) -> jax.stages.Compiled | None:
        """The step as it was kept; None, and the reason in `origins`, where it cannot be used."""
        try:
            compiled, self.origins[name] = self._load(name, arguments, result), LOADED
        except Exception as error:  # a file can be wrong in any way
            reason = str(error) if isinstance(error, UnusableFile) else repr(error)
            self.origins[name] = f"compiled: {reason}"
            return None
        return compiled

    @contextlib.contextmanager
    def _turn(self, name: str, before: tuple[int, int] | None):
        """Holds the lock of the process that compiles.

        The wait ends once another process has kept the step, whose version then differs from
        `before`. The kernel releases the lock when its process ends.
        """
        file = None
        if self._directory is not None:
            try:
                self._make_directory()
                file = self._path("compiling", "lock").open("ab")
            except (OSError, UnusableFile) as error:
                _log.warning("others may compile at the same time: %s", error)
        with file or contextlib.nullcontext():
            deadline = time.monotonic() + TURN_S
            while file and self._version(name) == before and time.monotonic() < deadline:
                if _try_lock(file):
                    break
                time.sleep(POLL_S)
            yield

    def _version(self, name: str) -> tuple[int, int] | None:
        """Identity of the file of a step, which is replaced as a whole; None without a file."""
        try:
            found = self._path(name, "step").stat() if self._directory else None
        except OSError:
            found = None
        return found and (found.st_ino, found.st_mtime_ns)

    def _make_directory(self) -> None:
        """Makes the directory. Raises UnusableFile if other users may write to it."""
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        _require_own(self._directory)

    def _path(self, name: str, suffix: str) -> pathlib.Path:
        return self._directory / f"{name}-{self._facts['platform']}.{suffix}"

    def _load(self, name: str, arguments: tuple, result) -> jax.stages.Compiled:
        if self._directory is None:
            raise UnusableFile("no directory for executables")
        path = self._path(name, "step")
        _require_own(self._directory)
        payload = pickle.loads(_checked(_read(path), self._facts))
        prepare_loading()
        in_tree = jax.tree.structure((arguments, {}))
        return executable_from_payload(payload, in_tree, jax.tree.structure(result))

    def _keep(self, name: str, compiled: jax.stages.Compiled) -> None:
        if self._directory is None:
            return
        path = self._path(name, "step")
        draft = path.with_suffix(f".{os.getpid()}")
        try:
            self._make_directory()
            data = pickle.dumps(payload_of_executable(compiled))
            head = json.dumps(self._facts, sort_keys=True).encode()
            draft.write_bytes(MAGIC + head + b"\n" + _digest(data) + data)
            os.replace(draft, path)
        except Exception as error:  # the rank serves without it
            draft.unlink(missing_ok=True)
            _log.warning("step %s is not kept for other processes: %r", name, error)


def step_facts(config: RunConfig) -> dict[str, str]:
    """Everything that a compiled step depends on.

    `platform`, of the device kind and its driver, is short enough for a file name.
    """
    device, engine = jax.devices()[0], repr((config.model, config.engine, config.platform))
    kind = f"{device.device_kind}{device.client.platform_version}{_processor()}"
    cluster = f"{config.cluster.ranks} ranks x {config.cluster.slots_per_rank} slots"
    return {
        "model and engine": _short(engine.encode()),
        "cluster": cluster,
        "jax": f"{jax.__version__}, jaxlib {jaxlib.__version__}",
        "python": platform.python_version(),
        "device": f"{device.platform} {device.device_kind}",
        "platform": _short(kind.encode()),
        "XLA_FLAGS": " ".join(sorted(os.environ.get("XLA_FLAGS", "").split())),
        "source": source_digest(),
    }


@functools.cache
def source_digest() -> str:
    """Digest of all modules of the runtime and of the kernels."""
    found = hashlib.blake2b(digest_size=16)
    for package in (eep_jax, pallas_kernels):
        root = pathlib.Path(package.__path__[0])
        for path in sorted(root.rglob("*.py")):
            found.update(f"{path.relative_to(root.parent)}\0".encode() + path.read_bytes())
    return found.hexdigest()


def _processor() -> str:
    """The instruction sets of this CPU: XLA compiles for exactly these."""
    for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith(("flags", "Features")):
            return line
    return platform.processor()


def _require_own(directory: pathlib.Path) -> None:
    """Raises UnusableFile if other users may write: loading an executable runs its code."""
    try:
        found = directory.stat()
    except FileNotFoundError:
        raise UnusableFile("no executable was kept") from None
    if found.st_uid != os.geteuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise UnusableFile(
            f"{directory} must be owned by the current user and not group- or world-writable"
        )


def _try_lock(file) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _read(path: pathlib.Path) -> bytes:
    try:
        if path.stat().st_size > FILE_BYTES_MAX:
            raise UnusableFile(f"{path} is larger than {FILE_BYTES_MAX} bytes")
        return path.read_bytes()
    except FileNotFoundError:
        raise UnusableFile("no executable was kept") from None


def _checked(data: bytes, facts: dict[str, str]) -> bytes:
    """The payload behind the head. Raises UnusableFile for damage, or facts unlike `facts`."""
    file = io.BytesIO(data)
    if file.read(len(MAGIC)) != MAGIC:
        raise UnusableFile("the file is of another format")
    try:
        found = json.loads(file.readline(LINE_BYTES_MAX))
        differing = [key for key in sorted(facts | found) if found.get(key) != facts.get(key)]
    except (ValueError, TypeError, AttributeError) as error:
        raise UnusableFile(f"its head is damaged: {error}") from error
    if differing:
        key = differing[0]
        raise UnusableFile(f"made for {key} {found.get(key)}, this is {facts.get(key)}")
    expected, payload = file.read(len(_digest(b""))), file.read()
    if _digest(payload) != expected:
        raise UnusableFile("its digest differs from the one that it was written with")
    return payload


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


def _short(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=8).hexdigest()
