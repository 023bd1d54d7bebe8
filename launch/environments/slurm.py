"""Processes of a SLURM job: ranks and the supervisor's address from SLURM's variables.

`sbatch` and `srun` set them; see "OUTPUT ENVIRONMENT VARIABLES" in their manuals. The replacement
of a lost task runs in an `srun --overlap` of its own, as task 0 of 1: its rank comes from flags.
"""

import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from launch.environments.environment import (
    Address,
    Identity,
    Resolve,
    check_rank,
    is_loopback,
    parse_address,
    resolve,
)
from launch.errors import UsageError

# Below the ephemeral ports of Linux, which begin at 32768. Two jobs with the same first node
# collide only if the last four digits of their numbers are equal.
HTTP_PORTS, CONTROL_PORTS, PORTS_PER_KIND = 10_000, 20_000, 10_000
HOSTS_MAX = 100_000

_RANGE = re.compile(r"(\d+)(?:-(\d+))?")
_REPEATED = re.compile(r"(\d+)(?:\(x(\d+)\))?")


class SlurmTask(NamedTuple):
    """Node of a task, with tasks in blocks over the nodes."""

    rank: int
    node: str
    local_rank: int
    local_ranks: int


class SlurmEnvironment:
    """Identity from SLURM_PROCID and its kin, the supervisor on the first node of the job."""

    def __init__(
        self,
        variables: Mapping[str, str],
        task_ranks: tuple[int, ...] = (),
        resolve: Resolve = resolve,
    ):
        """`task_ranks[i]` is the rank of the step's task i; empty: task i is rank i."""
        self._variables, self._task_ranks, self._resolve = variables, task_ranks, resolve

    @property
    def job(self) -> int:
        return self._number("SLURM_JOB_ID")

    @property
    def nodes(self) -> tuple[str, ...]:
        """All nodes of the job."""
        return expand_hostlist(self._text("SLURM_JOB_NODELIST"))

    @property
    def tasks(self) -> int:
        """Number of tasks of this step, or of the job in its batch script."""
        step = "SLURM_STEP_NUM_TASKS"
        return self._number(step if step in self._variables else "SLURM_NTASKS")

    def places(self) -> tuple[SlurmTask, ...]:
        """Nodes of the tasks of a step of the whole job; for the batch script."""
        counts = expand_counts(self._text("SLURM_TASKS_PER_NODE"))
        nodes, found = self.nodes, []
        if len(counts) != len(nodes):
            raise UsageError(f"SLURM names {len(nodes)} nodes and tasks for {len(counts)}")
        for node, count in zip(nodes, counts, strict=True):
            found += [SlurmTask(len(found) + i, node, i, count) for i in range(count)]
        return tuple(found)

    def identity(
        self, ranks: int, rank: int | None, local_rank: int | None, local_ranks: int | None
    ) -> Identity:
        return Identity(
            rank=check_rank(self._own_rank(ranks) if rank is None else rank, ranks),
            local_rank=self._number("SLURM_LOCALID") if local_rank is None else local_rank,
            local_ranks=self._tasks_here() if local_ranks is None else local_ranks,
        )

    def supervisor(self, given: str, control_port: int) -> Address:
        if given:
            return self._reachable(parse_address(given), f"--supervisor={given}")
        port = control_port or CONTROL_PORTS + self.job % PORTS_PER_KIND
        first = self.nodes[0]
        return self._reachable(Address(first, port), f"{first}, the first node of the job,")

    def http(self, supervisor: Address | None) -> Address | None:
        port = HTTP_PORTS + self.job % PORTS_PER_KIND
        return None if supervisor is None else Address(supervisor.host, port)

    def _own_rank(self, ranks: int) -> int:
        task, tasks = self._number("SLURM_PROCID"), self.tasks
        if self._task_ranks:
            if tasks != len(self._task_ranks):
                raise UsageError(
                    f"--task_ranks names {len(self._task_ranks)} ranks, the step has {tasks} tasks"
                )
            return self._task_ranks[task]
        if tasks != ranks:
            raise UsageError(
                f"the step has {tasks} tasks, the configuration {ranks} ranks; submit with "
                f"--ntasks={ranks}, or add --override=cluster.ranks={tasks}. A step that starts "
                "some of the ranks names them with --rank or --task_ranks"
            )
        return task

    def _tasks_here(self) -> int:
        name = "SLURM_STEP_TASKS_PER_NODE"
        counts = self._text(name if name in self._variables else "SLURM_TASKS_PER_NODE")
        return expand_counts(counts)[self._number("SLURM_NODEID")]

    def _reachable(self, address: Address, what: str) -> Address:
        """The numeric address. Raises UsageError if the job's other nodes cannot reach it."""
        try:
            found = self._resolve(address.host)
        except OSError as error:
            raise UsageError(
                f"the supervisor's address: {what} cannot be resolved: {error}; give an address "
                "that all nodes know, --supervisor=HOST:PORT"
            ) from error
        if len(self.nodes) > 1 and is_loopback(found):
            raise UsageError(
                f"the supervisor's address: {what} resolves to {found}, which none of "
                f"the other nodes of job {self.job} can reach ({len(self.nodes)} nodes); take the "
                "name off the loopback lines of /etc/hosts, or give an address of the first node "
                "in the cluster's network, --supervisor=ADDRESS:PORT"
            )
        return Address(found, address.port)

    def _text(self, name: str) -> str:
        value = self._variables.get(name, "")
        if not value:
            raise UsageError(
                f"--environment=slurm, but {name} is not set: start this with sbatch or srun"
            )
        return value

    def _number(self, name: str) -> int:
        value = self._text(name)
        if not value.isdecimal():
            raise UsageError(f"{name}={value!r} is not a number")
        return int(value)


def expand_hostlist(text: str) -> tuple[str, ...]:
    """SLURM's short form of node names: `n[0-2,07],login` is n0 n1 n2 n07 login.

    Like `scontrol show hostnames`, which may be missing on compute nodes. Several brackets in one
    name multiply, the last one varying fastest. Raises UsageError.
    """
    found: list[str] = []
    for part in _outside_brackets(text):
        for name in _expand(part, text):
            found.append(name)
            if len(found) > HOSTS_MAX:
                raise UsageError(f"{text:.80} names more than {HOSTS_MAX} nodes")
    return tuple(found)


def _outside_brackets(text: str) -> Iterator[str]:
    depth, start = 0, 0
    for index, character in enumerate(text + ","):
        depth += (character == "[") - (character == "]")
        if character == "," and depth == 0:
            if index > start:
                yield text[start:index]
            start = index + 1
    if depth:
        raise UsageError(f"the node list {text!r} has an unbalanced bracket")


def _expand(part: str, text: str) -> Iterator[str]:
    before, bracket, rest = part.partition("[")
    if not bracket:
        yield part
        return
    inside, _, after = rest.partition("]")
    for item in inside.split(","):
        match = _RANGE.fullmatch(item)
        if match is None:
            raise UsageError(f"the node list {text!r} holds {item!r}, expected 3 or 0-3")
        low, high = match[1], match[2] or match[1]
        width = len(low) if low.startswith("0") or len(low) == len(high) else 0
        for number in range(int(low), int(high) + 1):
            for tail in _expand(after, text):
                yield f"{before}{number:0{width}}{tail}"


def expand_counts(text: str) -> tuple[int, ...]:
    """SLURM's short form of a number per node: `2(x3),1` is 2 2 2 1. Raises UsageError."""
    found: list[int] = []
    for item in text.split(","):
        match = _REPEATED.fullmatch(item)
        if match is None:
            raise UsageError(f"tasks per node are {text!r}, expected a form as 2(x3),1")
        found += [int(match[1])] * int(match[2] or 1)
    return tuple(found)
