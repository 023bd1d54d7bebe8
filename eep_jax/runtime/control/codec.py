"""Codec of the control channel: frozen dataclasses as MessagePack, checked by their annotations."""

import contextlib
import dataclasses
import functools
import itertools
import typing

import msgspec

from eep_jax.errors import ProtocolError

SHARED_MAX = 8  # parts of messages that an Encoder keeps encoded

_PACK = msgspec.msgpack.Encoder()
_FRAME = msgspec.msgpack.Decoder(tuple[str, msgspec.Raw])
_MALFORMED = (msgspec.DecodeError, RecursionError, TypeError, ValueError)


def encode(message) -> bytes:
    """`[class name, {field: value}]` as MessagePack.

    Raises:
      ProtocolError: MessagePack has no form for a value.
    """
    return _pack((type(message).__name__, message))


class Encoder:
    """`encode` for messages with parts in common. Not thread-safe: one per thread.

    A message that is sent to many ranks is encoded once, as is a frozen dataclass that consecutive
    messages hold in a field, such as the View of each Prepare.
    """

    def __init__(self):
        self._last: tuple[object, bytes] = (object(), b"")
        # The object is kept, too, so that no other one can get its id.
        self._shared: dict[int, tuple[object, msgspec.Raw]] = {}

    def encode(self, message) -> bytes:
        """Returns the bytes of `codec.encode(message)`, and raises what that raises."""
        if self._last[0] is not message:
            parts = {
                f.name: self._part(getattr(message, f.name)) for f in dataclasses.fields(message)
            }
            self._last = message, _pack((type(message).__name__, parts))
        return self._last[1]

    def _part(self, value):
        if not dataclasses.is_dataclass(value):
            return value
        if id(value) not in self._shared:
            while len(self._shared) >= SHARED_MAX:
                del self._shared[next(iter(self._shared))]  # the oldest
            self._shared[id(value)] = value, msgspec.Raw(_pack(value))
        return self._shared[id(value)][1]


def decode(data: bytes, allowed: dict[str, type], bytes_max: int):
    """Reads one message and checks it against the annotations of its class.

    Args:
      data: what `encode` returned, or anything else that arrived.
      allowed: the classes of messages that may arrive, by name.
      bytes_max: the largest size that is read.

    Returns:
      An instance of one of `allowed`.

    Raises:
      ProtocolError: `data` is too large or malformed, the message is unknown, or a field is
        unknown, missing or of a wrong type; the text names the path of the field.
    """
    if len(data) > bytes_max:
        raise ProtocolError(f"message of {len(data)} bytes, at most {bytes_max} are allowed")
    try:
        # This reads to the end of `data`: no length that it announces exceeds what is there.
        name, fields = _FRAME.decode(data)
    except msgspec.ValidationError as error:
        raise ProtocolError(f"expected [name, fields], got {data!r:.80}: {error}") from error
    except _MALFORMED as error:
        raise ProtocolError(f"not msgpack: {error}") from error
    if name not in allowed:
        raise ProtocolError(f"unknown message {name!r:.60}, expected one of {sorted(allowed)}")
    try:
        message = _decoder(allowed[name]).decode(fields)
        # msgspec skips unknown fields of dataclasses; if the same bytes come back, it skipped none.
        if encode(message) != data:
            _check(allowed[name], msgspec.msgpack.decode(fields), name)
        return message
    except _MALFORMED as error:
        with contextlib.suppress(*_MALFORMED):
            _check(allowed[name], msgspec.msgpack.decode(fields), name)  # names the field better
        raise ProtocolError(f"{name}: {error}") from error


_decoder = functools.cache(msgspec.msgpack.Decoder)
_hints = functools.cache(typing.get_type_hints)


def _pack(value) -> bytes:
    try:
        return _PACK.encode(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise ProtocolError(f"cannot encode {value!r:.200}: {error}") from error


def _check(kind, raw, path: str) -> None:
    """Raises ProtocolError for the first part of `raw` that is unknown, missing or not a `kind`."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if type(None) in arguments:
        (kind,) = (k for k in arguments if k is not type(None))
        if raw is not None:
            _check(kind, raw, path)
        return
    if dataclasses.is_dataclass(kind) and isinstance(raw, dict):
        hints = _hints(kind)
        if unknown := [name for name in raw if name not in hints]:
            raise ProtocolError(
                f"{path} has unknown fields {unknown!r:.100}, expected {sorted(hints)}"
            )
        required = [f.name for f in dataclasses.fields(kind) if f.default is f.default_factory]
        if missing := [name for name in required if name not in raw]:
            raise ProtocolError(f"{path} lacks fields {missing}")
        for name, value in raw.items():
            _check(hints[name], value, f"{path}.{name}")
    elif origin is tuple and isinstance(raw, list):
        kinds = itertools.repeat(arguments[0]) if Ellipsis in arguments else arguments
        for index, (inner, value) in enumerate(zip(kinds, raw, strict=False)):
            _check(inner, value, f"{path}[{index}]")
    elif origin is dict and isinstance(raw, dict):
        for key, value in raw.items():
            _check(arguments[0], key, f"{path} key")
            _check(arguments[1], value, f"{path}[{key!r:.40}]")
    try:
        msgspec.convert(raw, kind)
    except msgspec.ValidationError as error:
        raise ProtocolError(f"{path} is {raw!r:.80}: {error}") from error
