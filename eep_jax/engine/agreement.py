"""Agreement of an epoch's ranks on the number of rows of each step, while steps overlap.

Each step carries votes, and its result the largest of them. A rank launches a step before the
result of the one under way is known, so a vote decides for the step after the next:

    step      0      1        2      3        4
    rows      small  of 0     small  of 1     of 2

Step 0, the first after a start, a pause or a change, is read before another is launched, and so
decides for step 1; step 2 is of the smallest size. A result of IDLE or HOLD launches no more; once
the steps under way are read, the last result decides: a pause, or a beginning with its rows as
those of step 1. Every rank sees the same results, and so launches the same steps.

Without overlap each step decides for the next.
"""

import collections

from eep_jax.engine.votes import HOLD, IDLE

UNKNOWN = -1  # rows of a step whose votes were not read yet
NO_STEP = (IDLE, HOLD, UNKNOWN)


class Agreement:
    """Rows of the coming steps.

    Args:
        smallest: rows of the smallest step.
        overlap: whether a step may be launched before the one under way is read; the same on all
            ranks.

    >>> agreement = Agreement(8)
    >>> agreement.take(), agreement.rows == UNKNOWN
    (8, True)
    >>> agreement.hear(40, is_last=True), agreement.take(), agreement.rows
    (None, 40, 8)
    """

    def __init__(self, smallest: int, overlap: bool = True):
        self._smallest, self._overlap = smallest, overlap
        self.begin()

    def begin(self) -> None:
        """The next step is the first one."""
        self._coming = collections.deque([self._smallest])
        self._is_first, self._voted = True, IDLE

    @property
    def rows(self) -> int:
        """Rows of the next step to launch, or one of NO_STEP."""
        return self._coming[0] if self._coming else UNKNOWN

    def take(self) -> int:
        """Same, for a step that is launched now."""
        return self._coming.popleft()

    def put_back(self, rows: list[int]) -> None:
        """Steps of so many rows were discarded, and have to be launched anew."""
        self._coming.extendleft(reversed(rows))

    @property
    def between(self) -> int:
        """Rows, as far as they are known, of the step before the one that a vote of now is for."""
        if self._is_first or not self._overlap:
            return 0
        rows = self._coming[0] if self._coming else self._voted
        return 0 if rows in NO_STEP else rows

    def vote(self, rows: int) -> int:
        """Remembers the vote of the step that is launched, and returns it."""
        self._voted = rows
        return rows

    def hear(self, agreed: int, is_last: bool) -> int | None:
        """Takes in the result of a step that was read; IDLE or HOLD if all ranks stop here.

        Args:
            agreed: the largest vote in that step.
            is_last: no other step is under way.
        """
        self._coming.append(agreed)
        if self._is_first and self._overlap and agreed not in NO_STEP:
            self._coming.append(self._smallest)
        self._is_first = False
        if not is_last or self._coming[0] not in NO_STEP:
            return None
        last = self._coming[-1]
        self.begin()
        if last in NO_STEP:
            return last
        self._coming, self._is_first = collections.deque([last, self._smallest]), False
        return None
