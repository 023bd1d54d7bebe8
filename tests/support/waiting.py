"""Waiting for a file descriptor, with a deadline."""

import select


def is_readable(fileno: int, seconds: float) -> bool:
    """Whether there is something to read, or the end, before the time is over.

    `select.select` refuses descriptors from 1024 on, which a long test run may reach.
    """
    poll = select.poll()
    poll.register(fileno, select.POLLIN)
    return bool(poll.poll(1000 * seconds))
