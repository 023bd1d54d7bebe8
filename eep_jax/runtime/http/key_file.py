"""Keys of an API, one a line of a file, read again when the file changes."""

import hashlib
import hmac
import logging
import os
import pathlib
import time
from collections.abc import Callable, Iterable

KEY_CHARS_MIN, KEY_CHARS_MAX = 16, 512
KEYS_MAX = 1_000
FILE_BYTES_MAX = 1 << 20
LOOK_EVERY_S = 1.0

_log = logging.getLogger(__name__)


class KeySet:
    """Digests of keys, compared in constant time.

    Example:
        >>> keys = KeySet(["first-key-of-some-length", "second-key-of-some-length"])
        >>> "second-key-of-some-length" in keys, "second" in keys
        (True, False)
    """

    def __init__(self, keys: Iterable[str] = ()):
        self._digests = [_digest(key) for key in keys]

    def __contains__(self, key: str) -> bool:
        digest, found = _digest(key), False
        for known in self._digests:  # all of them, so that time does not tell which one it was
            found |= hmac.compare_digest(known, digest)
        return found


class KeyFile:
    """The keys of a file. A change counts within `LOOK_EVERY_S`.

    While a changed file cannot be used, the former keys stay and the log says why.

    Args:
        path: The file: one key a line; empty lines and lines that begin with # are skipped.
        now_s: Monotonic seconds.

    Raises:
        ValueError: The file cannot be read, has no key, or one that is too short.
    """

    def __init__(self, path: str | os.PathLike, now_s: Callable[[], float] = time.monotonic):
        self._path, self._now_s = pathlib.Path(path), now_s
        self._seen, self._look_at_s = self._stamp(), now_s() + LOOK_EVERY_S
        self._keys = read_keys(self._path)

    def __contains__(self, key: str) -> bool:
        if self._now_s() >= self._look_at_s:
            self._look_at_s = self._now_s() + LOOK_EVERY_S
            self._look()
        return key in self._keys

    def _look(self) -> None:
        stamp = self._stamp()
        if stamp == self._seen:
            return
        self._seen = stamp
        try:
            self._keys = read_keys(self._path)
            _log.info("%s: keys read again", self._path)
        except ValueError as error:
            _log.warning("%s; the former keys stay", error)

    def _stamp(self) -> tuple | None:
        try:
            found = os.stat(self._path)
        except OSError:
            return None
        return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def read_keys(path: pathlib.Path) -> KeySet:
    """The keys of a file. Raises ValueError, which names the line, never a key."""
    try:
        with path.open("rb") as file:
            data = file.read(FILE_BYTES_MAX + 1)
    except OSError as error:
        raise ValueError(f"keys cannot be read: {path}: {error.strerror}") from error
    if len(data) > FILE_BYTES_MAX:
        raise ValueError(f"{path} has more than {FILE_BYTES_MAX} bytes; expected one key a line")
    keys = []
    for number, line in enumerate(data.splitlines(), start=1):
        key = line.strip()
        if not key or key.startswith(b"#"):
            continue
        printable = all(0x21 <= byte <= 0x7E for byte in key)
        if not printable or not KEY_CHARS_MIN <= len(key) <= KEY_CHARS_MAX:
            raise ValueError(
                f"{path}, line {number}: expected {KEY_CHARS_MIN} to {KEY_CHARS_MAX} printable "
                f"ASCII characters without spaces, found {len(key)} bytes; make a key with "
                "`openssl rand -hex 32`"
            )
        keys.append(key.decode("ascii"))
    if not 0 < len(keys) <= KEYS_MAX:
        raise ValueError(
            f"{path} has {len(keys)} keys, expected 1 to {KEYS_MAX}, one a line; make one with "
            "`openssl rand -hex 32`"
        )
    return KeySet(keys)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
