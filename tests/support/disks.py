"""Disks without room, for this process alone."""

import contextlib
import resource


@contextlib.contextmanager
def room_for(size: int):
    """Files of this process take `size` bytes and no more: the write that crosses it is partial."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
