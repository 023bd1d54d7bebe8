"""Format of the journal: one line per record, each with its length and checksum.

    {"crc32":"764dd679","bytes":39,"record":{"epoch":3,"time":1.5,"kind":"prepare"}}

Each line is a JSON object, so `jq .record` reads a journal. The first record is the header: `kind`
is `journal`, `version` is VERSION, and `config` holds the facts of the run (see `run_facts`).
"""

import json
import pathlib
import re
import zlib
from typing import NamedTuple

from eep_jax.errors import RunDirError

VERSION = 2  # 1 had neither header, length nor checksum
HEADER = "journal"  # kind of the first record
_LINE = re.compile(rb'\{"crc32":"([0-9a-f]{8})","bytes":([0-9]{1,12}),"record":(.*)\}', re.DOTALL)
_BEGIN = b'{"crc32":"'
_AWAY = "or move it away to begin a new run, which forgets the requests in it"


class Contents(NamedTuple):
    """Contents of a journal. `end` is the offset behind the last whole line."""

    config: dict  # of the header
    records: list[dict]  # without the header, oldest first
    end: int


def encode_record(record: dict) -> bytes:
    """The line of a record, with its newline.

    Example:
        >>> encode_record({"kind": "a"})
        b'{"crc32":"f87f4e9d","bytes":12,"record":{"kind":"a"}}\\n'
    """
    text = json.dumps(record, separators=(",", ":")).encode()
    return b'{"crc32":"%08x","bytes":%d,"record":%b}\n' % (zlib.crc32(text), len(text), text)


def decode_line(line: bytes) -> dict:
    """The record of a line without its newline. Raises ValueError that says what is wrong."""
    match = _LINE.fullmatch(line)
    if match is None:
        raise ValueError(f"it is {line[:40]!r}, not a record")
    checksum, length, text = match[1].decode(), int(match[2]), match[3]
    if len(text) != length:
        raise ValueError(f"its record has {len(text)} bytes, not {length}")
    if f"{zlib.crc32(text):08x}" != checksum:
        raise ValueError(f"the checksum of its record is {zlib.crc32(text):08x}, not {checksum}")
    record = json.loads(text)
    if not isinstance(record, dict) or not isinstance(record.get("kind"), str):
        raise ValueError(f"its record is {text[:40]!r}, without a kind")
    return record


def header_of(config: dict) -> dict:
    return {"kind": HEADER, "version": VERSION, "config": config}


def read_journal(path: pathlib.Path) -> Contents:
    """Reads a whole journal; a missing file is an empty one.

    A last line without newline was never acknowledged, and is left out.

    Raises:
        RunDirError: A line is damaged, or another version wrote the file.
        OSError: The file cannot be read.
    """
    try:
        data = pathlib.Path(path).read_bytes()
    except FileNotFoundError:
        return Contents({}, [], 0)
    lines, end, records = data.split(b"\n"), 0, []
    for number, line in enumerate(lines[:-1], 1):
        try:
            records.append(decode_line(line))
        except ValueError as error:
            raise _damaged(path, number, line, end, error) from error
        end += len(line) + 1
    if not records:
        # Either the first line was cut off while it was written, or this is some other file.
        torn = (
            not data or data.startswith(_BEGIN) or _BEGIN.startswith(data) or not data.strip(b"\0")
        )
        if not torn:
            raise RunDirError(f"{path} is no journal: it begins with {data[:40]!r}; move it away")
        return Contents({}, [], 0)
    return Contents(_config_of(records[0], path), records[1:], end)


def _damaged(path, number: int, line: bytes, offset: int, error: ValueError) -> RunDirError:
    if number == 1 and _is_version_1(line):
        return RunDirError(
            f"{path} is a journal of version 1, this program reads version {VERSION}: finish its "
            f"run with the program that wrote it, {_AWAY}"
        )
    return RunDirError(
        f"{path} is damaged in line {number}: {error}. Restore the file; or cut it there, which "
        f"forgets what happened later (truncate -s {offset} FILE); {_AWAY}"
    )


def _is_version_1(line: bytes) -> bool:
    try:
        record = json.loads(line)
    except ValueError:
        return False
    return isinstance(record, dict) and "kind" in record


def _config_of(header: dict, path: pathlib.Path) -> dict:
    version = header.get("version") if header["kind"] == HEADER else None
    if version != VERSION:
        raise RunDirError(
            f"{path} begins with {header!r:.80}, expected the header of version {VERSION}: another "
            f"version of this program wrote it; finish its run with that one, {_AWAY}"
        )
    config = header.get("config")
    if not isinstance(config, dict):
        raise RunDirError(f"{path} has a header whose config is {config!r:.80}, not an object")
    return config
