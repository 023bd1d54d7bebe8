"""Durations of steps by their number of rows."""

KEPT = 0.9  # of the estimate, at each step of that size
FORGOTTEN = 0.999  # of the estimates of other sizes: one that was slow once is tried again


class StepTimes:
    """Running estimates of the seconds of each size.

    Args:
        sizes: rows of the steps, ascending.

    >>> times = StepTimes((8, 40))
    >>> times.add(40, 0.5), times.rows_within(0.1), times.rows_within(1.0)
    (None, 8, 40)
    """

    def __init__(self, sizes: tuple[int, ...]):
        self._sizes = sizes
        self._seconds: dict[int, float] = {}

    def add(self, rows: int, seconds: float) -> None:
        """Takes in one step of so many rows."""
        for size in self._seconds:
            self._seconds[size] *= FORGOTTEN
        known = self._seconds.get(rows, seconds)
        self._seconds[rows] = KEPT * known + (1 - KEPT) * seconds

    def rows_within(self, seconds: float) -> int:
        """Rows of the largest size below which none takes longer; the smallest size if it does.

        A size that was never run counts as fast enough.
        """
        fitting = self._sizes[0]
        for size in self._sizes:
            if self._seconds.get(size, 0) > seconds:
                break
            fitting = size
        return fitting
