"""Runs stories: text files of commands and the output they must have.

A block is some command lines, a line `----`, and the expected output up to the next blank line.
Lines before the first command of a block that start with `#` say why. `pytest --rewrite` writes
what the commands really print into the file; then review its diff.
"""

import dataclasses
import pathlib
from collections.abc import Callable

SEPARATOR = "----"


@dataclasses.dataclass(frozen=True)
class Block:
    """One step of a story."""

    comments: tuple[str, ...]
    commands: tuple[str, ...]
    expected: tuple[str, ...]

    def __str__(self) -> str:
        commands = (*self.commands, SEPARATOR) if self.commands else ()
        return "\n".join([*self.comments, *commands, *self.expected])


def parse(text: str) -> list[Block]:
    """The blocks of a story.

    >>> parse("# why\\nkill 2\\n----\\nepoch=2\\n")[0].commands
    ('kill 2',)
    """
    return [_block(part.splitlines()) for part in text.strip().split("\n\n") if part.strip()]


def _block(lines: list[str]) -> Block:
    comments = tuple(line for line in lines if line.startswith("#"))
    rest = [line for line in lines if not line.startswith("#")]
    if rest and SEPARATOR not in rest:
        raise ValueError(f"commands {rest} lack a line {SEPARATOR!r} and an expectation")
    cut = rest.index(SEPARATOR) if rest else 0
    return Block(comments, tuple(rest[:cut]), tuple(rest[cut + 1 :]))


def play(blocks: list[Block], run: Callable[[tuple[str, ...]], list[str]]) -> list[Block]:
    """The same blocks with the output that `run` gives for each one's commands."""
    return [
        dataclasses.replace(block, expected=tuple(run(block.commands))) if block.commands else block
        for block in blocks
    ]


def check(path: pathlib.Path, run: Callable[[tuple[str, ...]], list[str]], rewrite: bool) -> None:
    """Plays the story of `path` and asserts its expectations, or writes them where `rewrite`."""
    blocks = parse(path.read_text())
    played = play(blocks, run)
    if rewrite:
        path.write_text("\n\n".join(map(str, played)) + "\n")
        return
    for wanted, found in zip(blocks, played, strict=True):
        assert str(found) == str(wanted), f"{path.name}: if this is meant, run pytest --rewrite"
