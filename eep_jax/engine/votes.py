"""Votes for the next step: the number of rows that a rank needs; the largest vote of all wins.

The rows are out of `EngineConfig.step_sizes`, so every rank has a compiled step for each.
"""

IDLE = 0  # no step: all ranks pause until one has work
HOLD = 1 << 30  # no step: all ranks stop at this round, because an epoch is being prepared
