"""Admission of processes: the answer to a Hello, as a pure decision."""

import dataclasses

from eep_jax.coordination.protocol import Fenced, Refused, Welcome
from eep_jax.coordination.state import Arrived, Unrecorded
from eep_jax.runtime.control.messages import Hello


@dataclasses.dataclass(frozen=True, kw_only=True)
class Seen:
    """The facts that the answer to a Hello depends on.

    `newest` is the newest incarnation of the rank, 0 if there was none; `is_newest` whether the
    caller is the process that has it, and is current. `peers` are the Hellos of the other current
    ranks. `watchable`: whether the end of a process on the caller's host would be seen.
    """

    newest: int
    is_newest: bool
    peers: tuple[Hello, ...]
    watchable: bool


@dataclasses.dataclass(frozen=True)
class Returns:
    """A process with an incarnation reconnects: this connection is its channel now."""


def admit(hello: Hello, seen: Seen) -> Welcome | Arrived | Unrecorded | Returns | Refused | Fenced:
    """The answer, or an event for the coordinator, which then decides.

    A Refused process asks again later; Fenced is final.
    """
    if hello.incarnation:
        if hello.incarnation == seen.newest:
            return Returns()
        if hello.incarnation > seen.newest:
            return Unrecorded(hello.rank, hello.incarnation)
        return Fenced(
            reason=f"incarnation {hello.incarnation} of rank {hello.rank} is not the newest, "
            f"{seen.newest}"
        )
    if seen.is_newest:
        # It was admitted before, and the channel broke before the answer arrived.
        return Welcome(incarnation=seen.newest)
    if reason := out_of_reach(hello, seen.peers):
        return Fenced(reason=reason)
    if not seen.watchable:
        return Refused(
            reason=f"no launcher of host {hello.host} has called, so no process would see rank "
            f"{hello.rank} die: start ranks there with python -m launch.node"
        )
    return Arrived(hello.rank)


def out_of_reach(hello: Hello, peers: tuple[Hello, ...]) -> str:
    """Why this process and the current ranks cannot reach each other's memory, or ''."""
    hosts = sorted({peer.host for peer in (*peers, hello)})
    apart = sorted(peer.rank for peer in (*peers, hello) if not peer.mirrored)
    if len(hosts) == 1 or not apart:
        return ""
    return (
        f"ranks are on the hosts {hosts}, and ranks {apart} serve no mirror: start all ranks "
        "with --mirror_host=ADDRESS, at which ranks of other hosts reach theirs"
    )
