"""Client of the supervisor's admin API that drains one rank before it leaves, and undoes that."""

import json
import logging
import os
import pathlib
import time
import urllib.error
import urllib.request

from eep_jax.runtime.control.admin_key import admin_headers
from eep_jax.runtime.control.endpoint import ENDPOINT

_log = logging.getLogger(__name__)

CALL_TIMEOUT_S = 5.0
POLL_S = 0.05


class AdminClient:
    """Drains one rank of a run, and takes it back.

    Args:
        run_dir: Directory given to `start_supervisor`.
        rank: The rank.

    Example:
        >>> from eep_jax import AdminClient
        >>> AdminClient(run_dir, rank=0).drain(timeout_s=1.0)  # the only rank cannot be spared
        False
    """

    def __init__(self, run_dir: str | os.PathLike, rank: int):
        self._endpoint_file, self._rank = pathlib.Path(run_dir) / ENDPOINT, rank

    def drain(self, timeout_s: float) -> bool:
        """Takes the rank out between two steps, after others have the experts that only it has.

        Args:
            timeout_s: Time for the drain.

        Returns:
            False, with the reason in the log, where the others have too few slots, the supervisor
            is out of reach, or time ran out.
        """
        ends_s = time.monotonic() + timeout_s
        try:
            self._call("apply", {"action": "scale_down", "ranks": [self._rank]})
            while not self._is_drained():
                if time.monotonic() > ends_s:
                    _log.warning("rank %d was not drained within %g s", self._rank, timeout_s)
                    return False
                time.sleep(POLL_S)
            return True
        except (OSError, ValueError) as error:
            _log.warning("rank %d cannot be drained: %s", self._rank, _reason(error))
            return False

    def come_back(self) -> None:
        """Ends a drain of the rank, if there was one. Never raises."""
        try:
            if self._is_drained():
                self._call("apply", {"action": "scale_up", "ranks": [self._rank]})
        except (OSError, ValueError) as error:
            _log.debug("rank %d cannot ask to come back: %s", self._rank, _reason(error))

    def _is_drained(self) -> bool:
        return self._rank in self._call("status")["background"]["drained"]

    def _call(self, name: str, body: dict | None = None) -> dict:
        endpoint = json.loads(self._endpoint_file.read_text())
        url = f"http://{endpoint['http_host']}:{endpoint['http_port']}/v1/fault_tolerance/{name}"
        data = None if body is None else json.dumps(body).encode()
        headers = admin_headers(self._endpoint_file.parent) | {"Content-Type": "application/json"}
        request = urllib.request.Request(url, data, headers)
        with urllib.request.urlopen(request, timeout=CALL_TIMEOUT_S) as answer:
            return json.loads(answer.read())


def _reason(error: Exception) -> str:
    if not isinstance(error, urllib.error.HTTPError):
        return str(error)
    try:
        return json.loads(error.read())["error"]["message"]
    except (OSError, ValueError, KeyError, TypeError):
        return str(error)
