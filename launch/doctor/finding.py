"""Findings: the lines of the doctor's table, and the format of values in it."""

import dataclasses
import enum

from launch.doctor.machine import UNLIMITED


class Level(enum.Enum):
    OK, WARN, FAIL = "OK", "WARN", "FAIL"


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line of the table. `fix` is the remedy, unless it is OK."""

    level: Level
    subject: str
    found: str
    fix: str = ""


def either(right: bool, subject: str, found: str, fix: str, wrong: Level = Level.FAIL) -> Finding:
    return Finding(Level.OK, subject, found) if right else Finding(wrong, subject, found, fix)


def numbers(version: str) -> tuple[int, ...]:
    """`slurm-wlm 22.05.8` is (22, 5, 8); the first part that is not a number ends it."""
    found = []
    for part in version.split()[-1].split(".") if version.split() else []:
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        found.append(int(digits))
    return tuple(found)


def dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def limit(value: int) -> str:
    return "unlimited" if value == UNLIMITED else str(value)


def size(nbytes: int) -> str:
    if nbytes == UNLIMITED:
        return "unlimited"
    return f"{nbytes / 2**30:.1f} GiB" if nbytes >= 2**30 else f"{nbytes / 2**20:.1f} MiB"
