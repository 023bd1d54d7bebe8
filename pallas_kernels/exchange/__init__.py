"""Parts that dispatch and combine share: arguments, flags, waits, on a host and on a GPU."""
