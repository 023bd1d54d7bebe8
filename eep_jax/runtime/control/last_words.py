"""Last words of a process: the line of its log that says why it ends, marked with its pid.

Without the mark a line that speaks of another process's end, or of some error, passes for them.
"""

import os


def last_words(reason: str) -> str:
    """The line that this process writes as it ends.

    Args:
      reason: one line.

    Returns:
      The reason behind the mark, as in "process 4711 is ending: rank 2 was silent".
    """
    return _mark(os.getpid()) + reason


def find_last_words(log: str, pid: int) -> str:
    """The reason of a process's end in its log.

    Args:
      log: text of the log, or its end.
      pid: the process.

    Returns:
      The reason, '' if the log has none of this process.

    >>> find_last_words("12:00 rank1 W agent: process 7 is ending: no disk\\nbye", 7)
    'no disk'
    >>> find_last_words("12:00 W: rank 1 is ending: error: process 8 is ending: it slept", 7)
    ''
    """
    found = [line.split(_mark(pid), 1)[1] for line in log.splitlines() if _mark(pid) in line]
    return found[-1] if found else ""


def _mark(pid: int) -> str:
    return f"process {pid} is ending: "
