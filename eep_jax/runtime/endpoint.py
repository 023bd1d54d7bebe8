"""Where the supervisor listens: as its run directory says, or as told."""

import json
import pathlib


def find_supervisor(endpoint_file: pathlib.Path, address: str = "") -> str:
    """The URL of the control channel: at `address` (host:port) if given, else as the file says.

    The file is read anew each time: every supervisor rewrites it. Raises OSError, ValueError or
    LookupError while there is none, or none that is whole.
    """
    if not address:
        endpoint = json.loads(endpoint_file.read_text())
        host = endpoint["host"]
        address = f"[{host}]:{endpoint['port']}" if ":" in host else f"{host}:{endpoint['port']}"
    return f"http://{address}/control"
