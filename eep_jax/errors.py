"""Errors that users can meet. Each names the value, the expectation and the way out."""


class EepError(Exception):
    """Base of all errors of this project that are about the cluster rather than about one call."""


class CoverageLost(EepError):
    """Some expert has no live replica and none can be placed: the step must not run."""


class InvalidMove(EepError):
    """A change of the View or of a Placement that its current state does not allow."""


class CheckpointError(EepError):
    """A checkpoint or one of its weights is missing, unreadable, or not what its manifest says."""


class RelocationFailed(EepError):
    """No source could supply an expert; the message names every source tried and why it failed.

    `lost` holds such a message for each missing expert, if several were to be copied.
    """

    def __init__(self, message: str, lost: dict[int, str] | None = None):
        super().__init__(message)
        self.lost = lost or {}


class HeapError(EepError):
    """The symmetric heap could not reserve, map or exchange memory."""


class ProtocolError(EepError):
    """A message that is malformed, too large, or not allowed from its sender."""


class RankEnded(EepError):
    """This rank left its run, was evicted from it, or the supervisor ended the run."""


class QueueFull(EepError):
    """The queue of requests is at its maximum; try again later."""


class RunDirError(EepError):
    """A run directory that another process owns, another run left, or that others can write to."""
