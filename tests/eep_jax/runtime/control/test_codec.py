"""Every message survives the wire; whatever else arrives is refused, naming what is wrong."""

import contextlib
import dataclasses
import enum
import types
import typing

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eep_jax.coordination.protocol import Commit, Mode, Prepare, Status
from eep_jax.engine.request import Request
from eep_jax.errors import ProtocolError
from eep_jax.runtime.control import messages
from eep_jax.runtime.control.codec import SHARED_MAX, Encoder, decode, encode
from tests.support.factories import a_placement, a_status, a_view

ALL = messages.TO_RANK | messages.TO_SUPERVISOR
BYTES_MAX = 1 << 20
INTS = st.integers(-(2**63), 2**64 - 1)
KEYS = st.text(max_size=4) | INTS
ANYTHING = st.recursive(
    st.none() | st.booleans() | KEYS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=12,
)


def values_of(kind) -> st.SearchStrategy:
    """Values of any annotation that messages use."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return st.one_of([st.none() if a is type(None) else values_of(a) for a in arguments])
    if origin is tuple and arguments[-1] is Ellipsis:
        return st.lists(values_of(arguments[0]), max_size=3).map(tuple)
    if origin is tuple:
        return st.tuples(*map(values_of, arguments))
    if origin is dict:
        return st.dictionaries(*map(values_of, arguments), max_size=3)
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        return st.builds(
            kind, **{f.name: values_of(hints[f.name]) for f in dataclasses.fields(kind)}
        )
    if issubclass(kind, enum.Enum):
        return st.sampled_from(kind)
    floats = st.floats(allow_nan=False)
    return {int: INTS, str: st.text(max_size=8), bool: st.booleans(), float: floats}[kind]


def a_prepare() -> Prepare:
    return Prepare(
        epoch=3, view=a_view(), placement=a_placement(), moves=(), handles={1: "slab"}, reason="why"
    )


def a_request(**changes) -> Request:
    values = {
        "id": "r",
        "prompt": (1,),
        "max_tokens": 2,
        "temperature": 1.0,
        "top_p": 1.0,
        "seed": 3,
    }
    return Request(**values | changes)


def changed(message, path: str, value) -> bytes:
    """The encoded message with the value at `path` ("view.members.0.state") replaced, or added."""
    name, fields = msgpack.unpackb(encode(message), strict_map_key=False)
    *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    inner = fields
    for part in parents:
        inner = inner[part]
    inner[last] = value
    return msgpack.packb([name, fields])


def refusal(data: bytes, allowed=ALL, bytes_max: int = BYTES_MAX) -> str:
    with pytest.raises(ProtocolError) as caught:
        decode(data, allowed, bytes_max)
    return str(caught.value)


class TestRoundTrip:
    @pytest.mark.parametrize("name", sorted(ALL))
    def test_every_message_comes_back_equal_and_with_its_types(self, name):
        @given(values_of(ALL[name]))
        def check(message):
            found = decode(encode(message), ALL, BYTES_MAX)
            assert found == message
            assert type(found) is type(message)
            assert repr(found) == repr(message)  # 1 is not 1.0, a list is no tuple

        check()

    def test_a_field_with_a_default_may_be_left_out(self):
        name, fields = msgpack.unpackb(encode(a_status(1)))
        kept = {k: fields[k] for k in ("rank", "incarnation", "sequence", "mode")}
        found = decode(msgpack.packb([name, kept]), ALL, BYTES_MAX)
        assert found == Status(rank=1, incarnation=1, sequence=1, mode=Mode.OFFERED)


class TestRefusals:
    @pytest.mark.parametrize(
        ("message", "path", "value", "names"),
        [
            (a_status(1), "rank", "1", "Status.rank"),
            (a_status(1), "rank", True, "Status.rank"),
            (a_status(1), "rank", 1.0, "Status.rank"),
            (a_status(1), "rank", None, "Status.rank"),
            (a_status(1), "mode", "asleep", "Status.mode"),
            (a_status(1), "mode", [], "Status.mode"),
            (a_status(1), "contents", 3, "Status.contents"),
            (a_status(1), "contents", {"0": 1}, "Status.contents"),
            (a_status(1), "contents", [0, False], "Status.contents[1]"),
            (a_status(1), "handle", b"slab", "Status.handle"),
            (a_status(1), "wings", 2, "wings"),
            (a_prepare(), "view.wings", 2, "Prepare.view has unknown fields ['wings']"),
            (a_prepare(), "view.members.2.wings", 2, "Prepare.view.members[2] has unknown fields"),
            (a_prepare(), "handles", {"1": "slab"}, "Prepare.handles key"),
            (a_prepare(), "handles", {1: 2}, "Prepare.handles[1]"),
            (a_prepare(), "handles", [], "Prepare.handles"),
            (a_prepare(), "view", [], "Prepare.view"),
            (a_prepare(), "view.members.2.state", "gone", "Prepare.view.members[2].state"),
            (a_prepare(), "placement.slots.1", 7, "Prepare.placement.slots[1]"),
            (
                messages.Generate(request=a_request()),
                "request.temperature",
                "1",
                "request.temperature",
            ),
            (messages.Generate(request=a_request()), "request.prompt", "abc", "request.prompt"),
        ],
    )
    def test_a_wrong_value_is_named(self, message, path, value, names):
        assert names in refusal(changed(message, path, value))

    @pytest.mark.parametrize("field", ["rank", "incarnation", "sequence", "mode"])
    def test_a_missing_field_is_named(self, field):
        name, fields = msgpack.unpackb(encode(a_status(1)))
        del fields[field]
        assert f"Status lacks fields ['{field}']" in refusal(msgpack.packb([name, fields]))

    def test_an_unknown_message_names_those_that_are_allowed(self):
        data = encode(Commit(epoch=1))
        text = refusal(data, messages.TO_SUPERVISOR)
        assert "'Commit'" in text and "'Status'" in text

    def test_a_large_message_is_not_even_read(self):
        assert "at most 10" in refusal(b"\xff" * 11, bytes_max=10)

    @pytest.mark.parametrize(
        "raw", [None, 3, "Status", [], ["Status"], ["Status", {}, 0], [1, {}], {"Status": {}}]
    )
    def test_what_is_not_a_name_with_fields_is_refused(self, raw):
        assert "expected [name, fields]" in refusal(msgpack.packb(raw))

    def test_a_whole_number_is_a_float_but_no_float_is_an_int(self):
        data = changed(messages.Generate(request=a_request()), "request.temperature", 1)
        temperature = decode(data, ALL, BYTES_MAX).request.temperature
        assert (temperature, type(temperature)) == (1.0, float)
        assert "seed" in refusal(
            changed(messages.Generate(request=a_request()), "request.seed", 3.0)
        )

    @given(st.binary(max_size=200))
    def test_random_bytes_are_refused_and_do_nothing_else(self, data):
        refusal(data)

    @pytest.mark.parametrize("field", [b"epoch", b"wings"])
    def test_a_deeply_nested_value_is_refused(self, field):
        fields = b"\x82\xa5epoch\x01\xa5" + field + b"\x91" * 100_000 + b"\xc0"
        refusal(b"\x92\xa6Commit" + fields)

    @pytest.mark.parametrize("size", [b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff"])
    def test_an_announced_length_beyond_the_message_reserves_nothing(self, size):
        assert "truncated" in refusal(b"\x92\xa6Status" + size)

    @given(st.data(), st.sampled_from(sorted(ALL)))
    def test_a_damaged_message_is_refused_or_is_another_message(self, data, name):
        encoded = bytearray(encode(data.draw(values_of(ALL[name]))))
        for _ in range(data.draw(st.integers(1, 3))):
            encoded[data.draw(st.integers(0, len(encoded) - 1))] = data.draw(st.integers(0, 255))
        try:
            found = decode(bytes(encoded), ALL, BYTES_MAX)
        except ProtocolError:
            return
        assert type(found) in ALL.values()

    @given(ANYTHING)
    def test_any_msgpack_in_place_of_the_fields_is_refused_or_read(self, fields):
        with contextlib.suppress(ProtocolError):
            decode(msgpack.packb(["Load", fields]), ALL, BYTES_MAX)

    def test_what_cannot_be_sent_is_the_senders_error(self):
        unsendable = Commit(epoch=1)
        object.__setattr__(unsendable, "epoch", object())
        with pytest.raises(ProtocolError, match="cannot encode"):
            encode(Commit(epoch=2**64))
        with pytest.raises(ProtocolError, match="cannot encode"):
            encode(unsendable)
        with pytest.raises(ProtocolError, match="cannot encode"):
            Encoder().encode(messages.Generate(request=a_request(seed=2**64)))


@pytest.mark.parametrize("encoder", [encode, Encoder().encode], ids=["each alone", "shared"])
def test_what_many_messages_share_is_encoded_as_if_each_were_alone(encoder):
    """Also a table that is changed in place between two messages, and the same message again."""
    view, handles = a_view(), {0: "a", 1: "b"}
    told = {"epoch": 2, "view": view, "placement": a_placement(), "moves": ()}
    for changed in ("b", "c"):
        handles[1] = changed
        for reason in ("x", "y"):
            message = Prepare(**told, handles=handles, reason=reason)
            for data in (encoder(message), encoder(message)):
                found = decode(data, {"Prepare": Prepare}, 1 << 20)
                assert found == message and found.handles[1] == changed


def test_an_encoder_keeps_few_parts_and_gives_the_same_bytes():
    encoder = Encoder()
    for epoch in range(3 * SHARED_MAX):
        message = dataclasses.replace(a_prepare(), epoch=epoch, view=a_view())
        assert encoder.encode(message) == encode(message)
    assert len(encoder._shared) == SHARED_MAX
