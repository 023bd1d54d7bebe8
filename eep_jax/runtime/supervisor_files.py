"""Names of the files in a run directory that more than one process knows."""

ENDPOINT = "endpoint.json"  # where the control channel and HTTP listen
JOURNAL = "journal.jsonl"
