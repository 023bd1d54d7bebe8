"""Console output of commands: lines with the time, and progress.

On a terminal progress is one line that changes; in a file or a pipe every change is a line.
"""

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

STDOUT = Console(highlight=False)


def say(message: str, style: str = "", *, console: Console = STDOUT) -> None:
    """Prints `12:04:31.207 message`, never wrapped; `style` is one of rich, such as "bold red"."""
    now_s = time.time()
    clock = f"{time.strftime('%H:%M:%S', time.localtime(now_s))}.{int(now_s * 1000) % 1000:03d}"
    console.print(Text(clock, "dim"), Text(message, style), soft_wrap=True)


@contextlib.contextmanager
def progress(
    what: str, total: int, *, console: Console = STDOUT
) -> Iterator[Callable[[int], None]]:
    """Shows `ranks ready 3/4` while the body runs. Yields a function that takes the new number.

    with progress("ranks ready", 4) as show:
        show(3)
    """
    if console.is_terminal:
        with _live(what, total, console) as show:
            yield show
    else:
        yield _plain(what, total, console)


def _plain(what: str, total: int, console: Console) -> Callable[[int], None]:
    shown: list[int] = []

    def show(done: int) -> None:
        if shown != [done]:
            shown[:] = [done]
            say(f"{what} {done}/{total}", console=console)

    show(0)
    return show


@contextlib.contextmanager
def _live(what: str, total: int, console: Console) -> Iterator[Callable[[int], None]]:
    columns = (
        SpinnerColumn(finished_text="[green]✓"),
        TextColumn("{task.description} {task.completed:.0f}/{task.total:.0f}", markup=False),
        BarColumn(bar_width=24),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as bars:
        task = bars.add_task(what, total=total)
        yield lambda done: bars.update(task, completed=done)
