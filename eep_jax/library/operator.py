"""What a rank asks of its supervisor's HTTP API: to be let out before it leaves, and back in."""

import json
import logging
import pathlib
import time
import urllib.error
import urllib.request

_log = logging.getLogger(__name__)

CALL_TIMEOUT_S = 5.0
POLL_S = 0.05


class AdminClient:
    """Speaks for one rank of the run whose supervisor wrote `endpoint_file`."""

    def __init__(self, endpoint_file: pathlib.Path, rank: int):
        self._endpoint_file, self._rank = endpoint_file, rank

    def drain(self, timeout_s: float) -> bool:
        """Has the rank taken out between two steps, with what only it has brought to others.

        False, with the reason in the log, where the others have too few slots, where the supervisor
        cannot be reached, and after `timeout_s`.
        """
        ends_s = time.monotonic() + timeout_s
        try:
            self._call("apply", {"action": "scale_down", "ranks": [self._rank]})
            while not self._is_drained():
                if time.monotonic() > ends_s:
                    _log.warning("rank %d was not let out in %g s", self._rank, timeout_s)
                    return False
                time.sleep(POLL_S)
            return True
        except (OSError, ValueError) as error:
            _log.warning("rank %d leaves without being let out: %s", self._rank, _reason(error))
            return False

    def come_back(self) -> None:
        """Takes back a drain of this rank, if there was one; harmless, and never raises."""
        try:
            if self._is_drained():
                self._call("apply", {"action": "scale_up", "ranks": [self._rank]})
        except (OSError, ValueError) as error:
            _log.debug("rank %d cannot ask: %s", self._rank, _reason(error))

    def _is_drained(self) -> bool:
        return self._rank in self._call("status")["background"]["drained"]

    def _call(self, name: str, body: dict | None = None) -> dict:
        endpoint = json.loads(self._endpoint_file.read_text())
        url = f"http://{endpoint['http_host']}:{endpoint['http_port']}/v1/fault_tolerance/{name}"
        data = None if body is None else json.dumps(body).encode()
        with urllib.request.urlopen(url, data, timeout=CALL_TIMEOUT_S) as answer:
            return json.loads(answer.read())


def _reason(error: Exception) -> str:
    if not isinstance(error, urllib.error.HTTPError):
        return str(error)
    try:
        return json.loads(error.read())["error"]["message"]
    except (OSError, ValueError, KeyError, TypeError):
        return str(error)
