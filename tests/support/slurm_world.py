"""A real SLURM on this machine, in namespaces of its own: daemons, nodes to kill, HTTP."""

import asyncio
import concurrent.futures
import contextlib
import os
import pathlib
import shutil
import signal
import subprocess
import time

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "scancel", "squeue", "sinfo")
TOOLS = ("unshare", "nsenter", "ip", "mount")
NAMESPACES = ("--mount", "--net", "--pid", "--uts", "--ipc")
SCRIPT = pathlib.Path(__file__).with_name("slurm_world.sh")
START_S, COMMAND_S, POLL_S = 40.0, 30.0, 0.1


def why_not() -> str:
    """Why there can be no SLURM here, or ''."""
    missing = [name for name in (*PROGRAMS, *TOOLS) if not shutil.which(name)]
    if missing:
        return f"{', '.join(missing)} not found: apt-get install slurm-wlm munge iproute2"
    if os.geteuid():
        return "virtual nodes need root, for namespaces"
    tried = subprocess.run(
        ["unshare", *NAMESPACES, "--fork", "--mount-proc", "ip", "link", "set", "lo", "up"],
        capture_output=True,
        text=True,
        timeout=COMMAND_S,
    )
    return f"no namespaces: {tried.stderr.strip()}" if tried.returncode else ""


class SlurmWorld:
    """Nodes n0, n1, ... of a SLURM that nobody else sees; nothing of it outlives the `with`."""

    def __init__(self, directory: pathlib.Path, nodes: int):
        self.directory, self.nodes = directory, nodes
        self.init = 0  # pid of the first process inside, as seen from outside

    def __enter__(self) -> "SlurmWorld":
        with (self.directory / "world.log").open("wb") as log:
            self._process = subprocess.Popen(
                ["unshare", *NAMESPACES, "--fork", "--mount-proc", "--kill-child"]
                + ["bash", str(SCRIPT), str(self.directory), str(self.nodes)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            self.wait((self.directory / "ready").exists, START_S, "SLURM's start")
            children = f"/proc/{self._process.pid}/task/{self._process.pid}/children"
            self.init = int(pathlib.Path(children).read_text().split()[0])
        except BaseException as error:
            error.add_note(self.logs())
            self.__exit__()
            raise
        return self

    def __exit__(self, *_) -> None:
        self._process.kill()  # its child is killed with it, and that is process 1 of all inside
        self._process.wait(COMMAND_S)

    def wait(self, happened, deadline_s: float, what: str):
        """The first true value of `happened()`."""
        ends_s = time.monotonic() + deadline_s
        while not (found := happened()):
            assert self._process.poll() is None, f"the virtual SLURM has ended\n{self.logs()}"
            assert time.monotonic() < ends_s, f"no {what} within {deadline_s:g} s"
            time.sleep(POLL_S)
        return found

    def run(self, *command: str, directory: str | pathlib.Path = "/", **variables: str) -> str:
        """Output of a command inside. A command that fails is an AssertionError."""
        place = (f"--target={self.init}", f"--wd={directory}")
        inside = ["nsenter", *place, *NAMESPACES, "--", *command]
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "EEP_"))}
        done = subprocess.run(
            inside,
            env=environment | {"SLURM_CONF": str(self.directory / "slurm.conf")} | variables,
            capture_output=True,
            text=True,
            timeout=COMMAND_S,
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def do(self, coroutine, timeout_s: float):
        """Runs a coroutine whose connections are made inside."""

        def inside():
            with open(f"/proc/{self.init}/ns/net") as namespace:
                os.setns(namespace.fileno(), os.CLONE_NEWNET)  # of this thread alone
            return asyncio.run(asyncio.wait_for(coroutine, timeout_s))

        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            return pool.submit(inside).result(timeout_s + 10)

    def processes(self) -> dict[int, dict[str, str]]:
        """Variables of every process inside, by its pid as seen from outside."""
        namespace = os.readlink(f"/proc/{self.init}/ns/pid")
        found = {}
        for path in pathlib.Path("/proc").glob("[0-9]*"):
            try:
                if os.readlink(path / "ns/pid") == namespace:
                    lines = (path / "environ").read_text(errors="replace").split("\0")
                    found[int(path.name)] = dict(
                        line.split("=", 1) for line in lines if "=" in line
                    )
            except OSError:
                continue  # it has just ended
        return found

    def of_node(self, node: str) -> list[int]:
        """Pids of what runs on a node: its daemon, what manages its steps, and their tasks."""
        tasks = [
            pid for pid, names in self.processes().items() if names.get("SLURMD_NODENAME") == node
        ]
        managers = {pid for task in tasks if "slurmstepd" in command(pid := parent(task))}
        daemon = [pid for pid in self.processes() if command(pid).strip() == f"slurmd -N {node}"]
        return [*daemon, *managers, *tasks]

    def kill_node(self, node: str) -> None:
        """As if its power were cut: all of it at once, without a farewell."""
        found = self.of_node(node)
        assert found, f"nothing runs on {node}"
        for number in (signal.SIGSTOP, signal.SIGKILL):  # so that nobody sees another one's end
            for pid in found:
                with contextlib.suppress(ProcessLookupError):  # a rank ends with its task
                    os.kill(pid, number)

    def logs(self) -> str:
        found = [self.directory / "world.log", *sorted((self.directory / "log").glob("*"))]
        return "\n".join(f"== {p.name}\n{p.read_text(errors='replace')[-1500:]}" for p in found)


def parent(pid: int) -> int:
    status = pathlib.Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("PPid:")[2].split()[0])


def command(pid: int) -> str:
    try:
        return pathlib.Path(f"/proc/{pid}/cmdline").read_text(errors="replace").replace("\0", " ")
    except OSError:
        return ""
