"""Two real network namespaces of this machine, joined by one cable that can be cut."""

import contextlib
import dataclasses
import os
import secrets
import subprocess

ADDRESSES = ("10.87.13.1", "10.87.13.2")
COMMAND_S = 20.0


@dataclasses.dataclass(frozen=True)
class Cable:
    """Namespace `names[i]` has `ADDRESSES[i]`."""

    names: tuple[str, str]

    def command(self, side: int, command: list[str]) -> list[str]:
        """`command` as run inside one of the namespaces."""
        return ["ip", "netns", "exec", self.names[side], *command]

    def cut(self) -> None:
        self._set("down")

    def mend(self) -> None:
        self._set("up")

    def _set(self, state: str) -> None:
        run("ip", "-n", self.names[1], "link", "set", "cable", state)


def why_not() -> str:
    """Why this process cannot make network namespaces; '' if it can."""
    if os.geteuid() != 0:
        return f"network namespaces need root, this is user {os.geteuid()}"
    name = f"eep-try-{secrets.token_hex(3)}"
    try:
        run("ip", "netns", "add", name)
        run("ip", "netns", "del", name)
    except (OSError, subprocess.SubprocessError) as error:
        return f"`ip netns add` fails: {getattr(error, 'stderr', '') or error}"
    return ""


@contextlib.contextmanager
def a_cable():
    """Both namespaces, up and reachable from each other; they are gone afterwards."""
    suffix = secrets.token_hex(3)
    names = (f"eep-a-{suffix}", f"eep-b-{suffix}")
    made = []
    try:
        for name in names:
            run("ip", "netns", "add", name)
            made.append(name)
        # Made inside: no name of this machine's own interfaces is touched.
        run("ip", "-n", names[0], "link", "add", "cable", "type", "veth", "peer", "name", "other")
        run("ip", "-n", names[0], "link", "set", "other", "netns", names[1])
        run("ip", "-n", names[1], "link", "set", "other", "name", "cable")
        for name, address in zip(names, ADDRESSES, strict=True):
            run("ip", "-n", name, "address", "add", f"{address}/24", "dev", "cable")
            run("ip", "-n", name, "link", "set", "lo", "up")
            run("ip", "-n", name, "link", "set", "cable", "up")
        yield Cable(names)
    finally:
        for name in made:
            subprocess.run(["ip", "netns", "del", name], timeout=COMMAND_S, check=False)


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=COMMAND_S)
