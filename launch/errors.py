"""Error of usage, for flags and variables of a command."""


class UsageError(ValueError):
    """An unusable flag or variable; the message says what to write instead."""
