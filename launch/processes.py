"""What every process of a run does first: its log, and its bond with its parent."""

import ctypes
import faulthandler
import logging
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def set_up_logging(who: str) -> None:
    """Log lines on standard error, each naming the process; libraries speak only of trouble."""
    faulthandler.enable()  # a crash in native code leaves a trace
    form = f"%(asctime)s {who} %(levelname).1s %(name)s: %(message)s"
    logging.basicConfig(level=logging.WARNING, format=form, stream=sys.stderr, force=True)
    for package in ("eep_jax", "launch"):
        logging.getLogger(package).setLevel(logging.INFO)


def end_with_parent(parent_pid: int) -> None:
    """Has the kernel kill this process when its parent ends, so that nothing is left behind."""
    if not parent_pid:
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:  # it ended before the bond was made
        os._exit(0)
