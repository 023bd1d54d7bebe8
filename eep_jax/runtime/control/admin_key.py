"""Key with which the run's own processes use the admin API, derived from the run's token."""

import hashlib
import hmac
import os
import pathlib

from eep_jax.errors import RunDirError
from eep_jax.runtime.control.run_dir import read_token


def run_admin_key(token: str) -> str:
    """HMAC-SHA256 of a fixed text under the token; whoever sees it does not learn the token.

    Example:
        >>> len(run_admin_key("t" * 32)), run_admin_key("a" * 32) == run_admin_key("b" * 32)
        (64, False)
    """
    return hmac.new(token.encode(), b"eep-jax admin api", hashlib.sha256).hexdigest()


def admin_headers(run_dir: str | os.PathLike) -> dict[str, str]:
    """Headers of a call of the admin API by a process of the run; none without a token to read."""
    try:
        key = run_admin_key(read_token(pathlib.Path(run_dir)))
    except (OSError, RunDirError):
        return {}
    return {"Authorization": f"Bearer {key}"}
