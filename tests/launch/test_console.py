"""Console output: one line per change in a file, one changing line on a terminal."""

import io
import re

import pytest
from rich.console import Console

from launch.console import progress, say


def a_console(terminal: bool = False) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=60, highlight=False)


def lines(console: Console) -> list[str]:
    return console.file.getvalue().splitlines()


class TestSay:
    def test_a_line_begins_with_the_time(self):
        console = a_console()
        say("rank 2 is back", console=console)
        (line,) = lines(console)
        assert re.fullmatch(r"\d\d:\d\d:\d\d\.\d\d\d rank 2 is back", line)

    def test_a_long_line_is_never_broken(self):
        console = a_console()
        say("x" * 500, console=console)
        assert len(lines(console)) == 1 and "x" * 500 in lines(console)[0]

    @pytest.mark.parametrize("text", ["[red]not markup[/red]", "a [0, 1] list", "{curly}"])
    def test_nothing_in_a_message_is_markup(self, text):
        console = a_console()
        say(text, "bold red", console=console)
        assert text in lines(console)[0]


class TestProgress:
    def test_in_a_file_every_change_is_a_line_and_a_repetition_is_none(self):
        console = a_console()
        with progress("ranks ready", 4, console=console) as show:
            for done in (0, 1, 1, 3, 3, 4):
                show(done)
        assert [line.partition(" ")[2] for line in lines(console)] == [
            "ranks ready 0/4",
            "ranks ready 1/4",
            "ranks ready 3/4",
            "ranks ready 4/4",
        ]

    def test_on_a_terminal_it_ends_with_the_last_number(self):
        console = a_console(terminal=True)
        with progress("ranks [ready]", 4, console=console) as show:
            show(4)
        text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", console.file.getvalue())
        assert "ranks [ready] 4/4" in text

    @pytest.mark.parametrize("terminal", [False, True])
    def test_an_error_in_the_body_passes_through(self, terminal):
        with (
            pytest.raises(KeyError),
            progress("ranks ready", 4, console=a_console(terminal)) as show,
        ):
            show(1)
            raise KeyError
