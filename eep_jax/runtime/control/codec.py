"""Frozen dataclasses as bytes and back: msgpack, checked field by field against the annotations."""

import collections
import dataclasses
import enum
import functools
import types
import typing

import msgpack

from eep_jax.errors import ProtocolError

DEPTH_MAX = 12
SHARED_MAX = 8  # parts of messages that are kept encoded


def encode(message) -> bytes:
    """`[class name, {field: value}]` as msgpack. Raises ProtocolError for what cannot be sent.

    A View, Placement or table of handles that goes to many ranks is encoded once: what a field
    holds is kept as bytes for the next message that holds the very same object. So is the last
    message itself.
    """
    kept, data = _last[0]  # one read: other threads encode, too
    if kept is message:
        return data
    try:
        fields = dataclasses.fields(message)
        parts = [_ARRAY_OF_TWO, _name(type(message).__name__), _map_header(len(fields))]
        for field in fields:
            parts += _name(field.name), _packed(getattr(message, field.name))
        data = b"".join(parts)
    except (TypeError, ValueError, OverflowError) as error:
        raise ProtocolError(f"cannot encode {message!r:.200}: {error}") from error
    _last[0] = message, data
    return data


def decode(data: bytes, allowed: dict[str, type], bytes_max: int):
    """The message in `data`, an instance of one of `allowed`.

    Raises ProtocolError for anything too large, malformed, unknown or of a wrong type; nothing of
    such a message is used.
    """
    if len(data) > bytes_max:
        raise ProtocolError(f"message of {len(data)} bytes, at most {bytes_max} are allowed")
    try:
        # Keys of dicts may be ranks, which are ints.
        raw = msgpack.unpackb(data, strict_map_key=False)
    except Exception as error:  # msgpack raises many types
        raise ProtocolError(f"not msgpack: {error}") from error
    if not isinstance(raw, list) or len(raw) != 2 or not isinstance(raw[0], str):
        raise ProtocolError(f"expected [name, fields], got {raw!r:.200}")
    name, fields = raw
    if name not in allowed:
        raise ProtocolError(f"unknown message {name!r:.60}, expected one of {sorted(allowed)}")
    return _build(allowed[name], fields, name, 0)


_ARRAY_OF_TWO = b"\x92"
_SIMPLE = (int, float, str, bool, type(None))
_shared: collections.OrderedDict[int, tuple[object, object, bytes]] = collections.OrderedDict()


_last: list[tuple] = [(object(), b"")]  # message and bytes


@functools.cache
def _name(text: str) -> bytes:
    """Of a class or a field: there are few."""
    return msgpack.packb(text)


def _map_header(size: int) -> bytes:
    return bytes([0x80 | size]) if size < 16 else b"\xde" + size.to_bytes(2, "big")


def _packed(value) -> bytes:
    """The value as msgpack; the last large ones are kept, by identity."""
    if type(value) in _SIMPLE:
        return msgpack.packb(value)
    is_table = type(value) is dict and value
    if not is_table and not dataclasses.is_dataclass(value):
        return msgpack.packb(_plain(value))
    kept = _shared.get(id(value))
    # The object is kept too, so that no other one can have its id. A table might be changed in
    # place, a frozen dataclass not.
    if kept is not None and kept[0] is value and (not is_table or kept[1] == value):
        return kept[2]
    data = msgpack.packb(_plain(value))
    _shared[id(value)] = value, dict(value) if is_table else None, data
    while len(_shared) > SHARED_MAX:
        _shared.popitem(last=False)
    return data


def _plain(value):
    if dataclasses.is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, tuple | list):
        return [_plain(v) for v in value]
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return value


@functools.cache
def _fields_of(kind: type) -> dict[str, tuple]:
    hints = typing.get_type_hints(kind)
    return {f.name: (hints[f.name], _is_required(f)) for f in dataclasses.fields(kind)}


@functools.cache
def _parts_of(kind) -> tuple:
    return typing.get_origin(kind), typing.get_args(kind)


def _is_required(field: dataclasses.Field) -> bool:
    missing = dataclasses.MISSING
    return field.default is missing and field.default_factory is missing


def _build(kind, raw, path: str, depth: int):
    if depth > DEPTH_MAX:
        raise ProtocolError(f"{path} is nested more than {DEPTH_MAX} deep")
    if type(raw) is kind and kind in _SIMPLE:
        return raw
    origin, arguments = _parts_of(kind)
    if origin in (typing.Union, types.UnionType):
        if raw is None and type(None) in arguments:
            return None
        (kind,) = (a for a in arguments if a is not type(None))
        return _build(kind, raw, path, depth)
    if dataclasses.is_dataclass(kind):
        return _build_dataclass(kind, raw, path, depth)
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        try:
            return kind(raw)
        except (ValueError, TypeError):
            _refuse(path, f"one of {[m.value for m in kind]}", raw)
    if origin is tuple:
        return _build_tuple(arguments, raw, path, depth)
    if origin is dict or kind is dict:
        return _build_dict(arguments, raw, path, depth)
    # bool is an int in Python, but not here.
    accepted = (int, float) if kind is float else (kind,)
    if type(raw) not in accepted:
        _refuse(path, kind.__name__, raw)
    return kind(raw)


def _build_dataclass(kind, raw, path, depth):
    fields = _fields_of(kind)
    if not isinstance(raw, dict):
        _refuse(path, f"the fields of {kind.__name__}", raw)
    if unknown := [k for k in raw if k not in fields]:
        raise ProtocolError(
            f"{path} has unknown fields {unknown!r:.100}, expected {sorted(fields)}"
        )
    if missing := [n for n, (_, required) in fields.items() if required and n not in raw]:
        raise ProtocolError(f"{path} lacks fields {missing}")
    built = {n: _build(fields[n][0], v, f"{path}.{n}", depth + 1) for n, v in raw.items()}
    try:
        return kind(**built)
    except (ValueError, TypeError) as error:
        raise ProtocolError(f"{path}: {error}") from error


def _build_tuple(arguments, raw, path, depth):
    if not isinstance(raw, list):
        _refuse(path, "a list", raw)
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        kinds = (arguments[0],) * len(raw)
    elif len(arguments) == len(raw):
        kinds = arguments
    else:
        _refuse(path, f"{len(arguments)} values", raw)
    return tuple(
        _build(k, v, f"{path}[{i}]", depth + 1)
        for i, (k, v) in enumerate(zip(kinds, raw, strict=True))
    )


def _build_dict(arguments, raw, path, depth):
    if not isinstance(raw, dict):
        _refuse(path, "a map", raw)
    if not arguments:
        return raw
    keys, values = arguments
    return {
        _build(keys, k, f"{path} key", depth + 1): _build(
            values, v, f"{path}[{k!r:.40}]", depth + 1
        )
        for k, v in raw.items()
    }


def _refuse(path: str, expected: str, raw):
    raise ProtocolError(f"{path} is {raw!r:.80} ({type(raw).__name__}), expected {expected}")
