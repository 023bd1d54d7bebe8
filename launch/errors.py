"""What a person who started a command wrongly is told."""


class UsageError(ValueError):
    """A flag or a variable that cannot be used; the message says what to write instead."""
