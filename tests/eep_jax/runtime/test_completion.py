"""A request is checked field by field, and its tokens become text that is never taken back."""

import json
import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from eep_jax.runtime.completion import (
    CompletionLimits,
    RequestError,
    TextAssembler,
    parse_request,
)

LIMITS = CompletionLimits(model="tiny", context_tokens=32)


def body(**fields) -> dict:
    return {"model": "tiny", "prompt": "Hi"} | fields


def refusal(sent: object) -> RequestError:
    with pytest.raises(RequestError) as caught:
        parse_request(sent, LIMITS)
    return caught.value


class TestParseRequest:
    def test_the_shortest_body_gets_the_defaults_of_openai(self):
        request = parse_request(body(), LIMITS)
        assert request.prompt == (0, 72, 105)
        assert (request.max_tokens, request.temperature, request.top_p) == (16, 1.0, 1.0)
        assert (request.seed, request.stop, request.model) == (None, (), "tiny")
        assert (request.stream, request.include_usage) == (False, False)

    @pytest.mark.parametrize("prompt", ["Hi", ["Hi"], [72, 105], [0, 72, 105], [[72, 105]]])
    def test_every_form_of_one_prompt_gives_the_same_tokens(self, prompt):
        assert parse_request(body(prompt=prompt), LIMITS).prompt == (0, 72, 105)

    def test_an_empty_text_is_a_prompt_of_bos_alone(self):
        assert parse_request(body(prompt=""), LIMITS).prompt == (0,)

    def test_a_string_becomes_its_utf8_bytes(self):
        assert parse_request(body(prompt="é"), LIMITS).prompt == (0, 0xC3, 0xA9)

    def test_null_counts_as_absent_for_every_optional_field(self):
        optional = "max_tokens temperature top_p seed stop stream stream_options n best_of echo"
        optional += " logprobs suffix presence_penalty frequency_penalty logit_bias user"
        nulls = dict.fromkeys(optional.split())
        assert parse_request(body(**nulls), LIMITS) == parse_request(body(), LIMITS)

    @pytest.mark.parametrize(
        ("field", "value", "read"),
        [
            ("max_tokens", 29, 29),
            ("temperature", 0, 0.0),
            ("temperature", 2, 2.0),
            ("top_p", 1e-9, 1e-9),
            ("seed", -(2**63), -(2**63)),
            ("seed", 2**63 - 1, 2**63 - 1),
            ("stop", "END", ("END",)),
            ("stop", [], ()),
            ("stop", ["a", "b", "c", "d" * 64], ("a", "b", "c", "d" * 64)),
        ],
    )
    def test_values_at_their_limits_are_taken(self, field, value, read):
        assert getattr(parse_request(body(**{field: value}), LIMITS), field) == read

    def test_the_only_values_of_what_is_not_supported_are_taken(self):
        neutral = {"n": 1, "best_of": 1, "echo": False, "presence_penalty": 0.0, "user": "me"}
        sent = body(**neutral, frequency_penalty=0, logit_bias={})
        assert parse_request(sent, LIMITS) == parse_request(body(), LIMITS)

    def test_usage_is_included_where_a_stream_asks_for_it(self):
        sent = body(stream=True, stream_options={"include_usage": True})
        assert parse_request(sent, LIMITS).include_usage

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            *[("prompt", x) for x in [3, True, {}, [], [[]], ["a", "b"], [[1], [2]], [1, "a"]]],
            *[("prompt", x) for x in [[True], [1.0], [-1], [256], "a\0b", "\ud800", "x" * 31]],
            *[("max_tokens", x) for x in [0, -1, 16.0, True, "16", 30, 10**400]],
            *[("temperature", x) for x in [-0.1, 2.1, True, "1", math.nan, math.inf, 10**400]],
            *[("top_p", x) for x in [0, -1, 1.01, False, math.nan, -math.inf]],
            *[("seed", x) for x in [2**63, -(2**63) - 1, 1.0, True, "1"]],
            *[("stop", x) for x in ["", [""], 3, ["a"] * 5, ["a", 1], "x" * 65, "\udfff", {}]],
            *[("stream", x) for x in [0, 1, "true"]],
            *[("stream_options", x) for x in [{"include_usage": True}, {}, True]],
            *[("n", x) for x in [2, 0, True, 1.0]],
            *[("best_of", x) for x in [2, True]],
            *[("echo", x) for x in [True, 0]],
            *[("logprobs", x) for x in [0, 5, False]],
            ("suffix", ""),
            *[("presence_penalty", x) for x in [0.5, False, math.nan]],
            ("frequency_penalty", -1),
            *[("logit_bias", x) for x in [{"50256": -100}, []]],
            ("user", 7),
            ("temprature", 1),
            ("messages", None),
        ],
    )
    def test_a_refusal_names_the_field(self, field, value):
        error = refusal(body(**{field: value}))
        assert (error.status, error.field) == (400, field)
        assert field in str(error) and len(str(error)) < 400
        json.dumps(str(error))

    @pytest.mark.parametrize(
        ("options", "field"),
        [
            (True, "stream_options"),
            ({"usage": True}, "stream_options.usage"),
            ({"include_usage": 1}, "stream_options.include_usage"),
        ],
    )
    def test_wrong_stream_options_are_refused(self, options, field):
        assert refusal(body(stream=True, stream_options=options)).field == field

    @pytest.mark.parametrize("sent", [None, [], "text", 3])
    def test_a_body_that_is_no_object_is_refused(self, sent):
        assert refusal(sent).status == 400

    def test_another_model_is_not_found(self):
        error = refusal(body(model="gpt-4"))
        assert (error.status, error.field, error.code) == (404, "model", "model_not_found")
        assert "gpt-4" in str(error) and "tiny" in str(error)

    @pytest.mark.parametrize("sent", [{"prompt": "Hi"}, body(model=None), body(model=3)])
    def test_a_body_without_a_model_is_refused(self, sent):
        assert (refusal(sent).status, refusal(sent).field) == (400, "model")

    def test_what_does_not_fit_the_context_names_the_field_to_shorten(self):
        assert refusal(body(prompt="x" * 31, max_tokens=1)).field == "prompt"
        error = refusal(body(prompt="x" * 30, max_tokens=2))
        assert error.field == "max_tokens" and "at most 1" in str(error)
        assert parse_request(body(prompt="x" * 30, max_tokens=1), LIMITS).max_tokens == 1


def cut(text: str, stop: tuple[str, ...]) -> str:
    """The text up to the stop string that is complete first: the plain way to say it."""
    for end in range(1, len(text) + 1):
        if words := [word for word in stop if text[:end].endswith(word)]:
            return text[: end - max(map(len, words))]
    return text


def assemble(groups: list[bytes], stop: tuple[str, ...]) -> tuple[list[str], TextAssembler]:
    assembler = TextAssembler(stop)
    deltas = [assembler.feed(group) for group in groups]
    return [*deltas, assembler.finish()], assembler


FEW_LETTERS = st.text(alphabet="ab\u00e9\ufffd", max_size=12)
ANY_BYTES = st.lists(
    st.one_of(st.sampled_from(b"ab\xc3\xa9\xf0\x9f\x98\x80\xe2\xff"), st.integers(0, 255)),
    max_size=30,
).map(bytes)
STOPS = st.lists(FEW_LETTERS.filter(bool), max_size=4).map(tuple)


class TestTextAssembler:
    @given(st.one_of(FEW_LETTERS.map(str.encode), ANY_BYTES), STOPS, st.data())
    def test_deltas_join_to_the_text_before_the_first_stop_string(self, data, stop, draw):
        ends = sorted(draw.draw(st.lists(st.integers(0, len(data)), max_size=6)))
        groups = [data[a:b] for a, b in zip([0, *ends], [*ends, len(data)], strict=True)]
        deltas, grouped = assemble(groups, stop)
        text = data.decode(errors="replace")
        assert "".join(deltas) == cut(text, stop)
        assert grouped.stopped == (cut(text, stop) != text or any(word in text for word in stop))
        _, single = assemble([bytes((byte,)) for byte in data], stop)
        assert grouped.num_tokens == single.num_tokens

    @given(FEW_LETTERS, STOPS)
    @example("aab", ("ab",))
    @example("abab\u00e9", ("ababa", "bab"))
    def test_every_prefix_that_was_sent_stays_true(self, text, stop):
        assembler, sent = TextAssembler(stop), ""
        for byte in text.encode():
            sent += assembler.feed((byte,))
            assert cut(text, stop).startswith(sent)

    def test_a_character_is_sent_whole(self):
        assembler = TextAssembler(())
        deltas = [assembler.feed((byte,)) for byte in "a€".encode()]
        assert deltas == ["a", "", "", "€"]

    def test_what_may_begin_a_stop_string_is_held_back_until_it_does_not(self):
        assembler = TextAssembler(("END",))
        assert assembler.feed(b"the E") == "the "
        assert assembler.feed(b"N") == ""
        assert assembler.feed(b"!") == "EN!"

    def test_tokens_are_counted_up_to_the_end_of_the_stop_string(self):
        assembler = TextAssembler(("END",))
        assert assembler.feed(b"onENDtwo") == "on"
        assert (assembler.stopped, assembler.num_tokens) == (True, 5)
        assert (assembler.feed(b"more"), assembler.finish(), assembler.num_tokens) == ("", "", 5)

    def test_of_stop_strings_that_end_together_the_longest_counts(self):
        assert assemble([b"xabc"], ("c", "abc", "bc"))[0] == ["x", ""]

    def test_an_unfinished_character_becomes_a_replacement_at_the_end(self):
        assert assemble([b"a\xe2\x82"], ())[0] == ["a", "\ufffd"]
