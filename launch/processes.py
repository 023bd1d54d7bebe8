"""Start of every process of a run: its log, its signals, and its end with its parent."""

import asyncio
import ctypes
import faulthandler
import logging
import os
import resource
import signal
import sys
from collections.abc import Callable

from launch.repeated_lines import CountRepeats

_PR_SET_PDEATHSIG = 1
DESCRIPTORS_MAX = 65_536


def set_up_logging(name: str) -> None:
    """Logs to standard error, with the process's name in each line; of libraries only warnings."""
    faulthandler.enable()  # a crash in native code leaves a trace
    form = f"%(asctime)s {name} %(levelname).1s %(name)s: %(message)s"
    logging.basicConfig(level=logging.WARNING, format=form, stream=sys.stderr, force=True)
    for handler in logging.getLogger().handlers:
        handler.addFilter(CountRepeats())
    for package in ("eep_jax", "launch"):
        logging.getLogger(package).setLevel(logging.INFO)


def raise_descriptor_limit() -> None:
    """Takes as many file descriptors as the system allows this process, up to DESCRIPTORS_MAX."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = DESCRIPTORS_MAX if hard == resource.RLIM_INFINITY else min(hard, DESCRIPTORS_MAX)
    if soft != resource.RLIM_INFINITY and soft < allowed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))


def end_with_parent(parent_pid: int) -> None:
    """Makes the kernel kill this process when its parent ends. 0: does nothing."""
    if not parent_pid:
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:  # it had already ended
        os._exit(0)


def keep_files_private() -> None:
    """Makes what this process writes readable for its user alone: logs, journals, caches."""
    os.umask(0o077)


def on_wish_to_stop(stop: Callable[[], None]) -> None:
    """Calls `stop` in the running loop for Ctrl-C, SIGTERM, and the end of the terminal (SIGHUP).

    Under `nohup` the end of the terminal is none of its business.
    """
    loop, wishes = asyncio.get_running_loop(), [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        wishes.append(signal.SIGHUP)
    for number in wishes:
        loop.add_signal_handler(number, stop)
