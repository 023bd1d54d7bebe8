"""A request is checked field by field."""

import json
import math

import pytest

from eep_jax.engine.request import Shaping
from eep_jax.runtime.http.checks import RequestError
from eep_jax.runtime.http.completion import CompletionLimits, parse_request, parse_requests

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

    def test_what_shapes_the_choice_of_tokens_is_read(self):
        sent = {"top_k": 40, "min_p": 0.1, "repetition_penalty": 1.2, "presence_penalty": -2}
        sent |= {"frequency_penalty": 2, "logit_bias": {"7": -100, "3": 1.5}, "min_tokens": 16}
        sent |= {"stop_token_ids": [9, 3], "ignore_eos": True, "bad_words": ["ab", "c"]}
        assert parse_request(body(**sent), LIMITS).shaping == Shaping(
            top_k=40,
            min_p=0.1,
            repetition_penalty=1.2,
            presence_penalty=-2.0,
            frequency_penalty=2.0,
            logit_bias=((3, 1.5), (7, -100.0)),
            min_tokens=16,
            stop_token_ids=(3, 9),
            ignore_eos=True,
            bad_words=((97, 98), (99,)),
        )

    @pytest.mark.parametrize("top_k", [-1, 0, 256, 2**40])
    def test_a_top_k_of_all_tokens_asks_for_nothing(self, top_k):
        assert parse_request(body(top_k=top_k), LIMITS) == parse_request(body(), LIMITS)

    def test_every_choice_is_a_request_of_its_own(self):
        sent = body(prompt=["Hi", "Ho"], n=2, best_of=2, seed=7, echo=True)
        found = parse_requests(sent, LIMITS)
        assert [r.prompt for r in found] == [(0, 72, 105)] * 2 + [(0, 72, 111)] * 2
        assert [r.seed for r in found] == [7, 8, 7, 8], "answers to one prompt differ"
        assert [(r.index, r.choices, r.echo) for r in found] == [
            *[(0, 4, "Hi"), (1, 4, "Hi"), (2, 4, "Ho"), (3, 4, "Ho")]
        ]

    def test_too_many_choices_over_all_prompts_are_refused(self):
        assert refusal(body(prompt=["a"] * 2, n=65)).field == "n"
        assert len(parse_requests(body(prompt=["a"] * 2, n=64), LIMITS)) == 128

    def test_a_prompt_of_ids_is_echoed_as_text(self):
        assert parse_request(body(prompt=[72, 105], echo=True), LIMITS).echo == "Hi"

    def test_usage_is_included_where_a_stream_asks_for_it(self):
        sent = body(stream=True, stream_options={"include_usage": True})
        assert parse_request(sent, LIMITS).include_usage

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            *[
                ("prompt", x)
                for x in [3, True, {}, [], [[]], ["a", 1], [[1], []], [1, "a"], ["a"] * 129]
            ],
            *[("prompt", x) for x in [[True], [1.0], [-1], [256], "a\0b", "\ud800", "x" * 31]],
            *[("max_tokens", x) for x in [0, -1, 16.0, True, "16", 30, 10**400]],
            *[("temperature", x) for x in [-0.1, 2.1, True, "1", math.nan, math.inf, 10**400]],
            *[("top_p", x) for x in [0, -1, 1.01, False, math.nan, -math.inf]],
            *[("seed", x) for x in [2**63, -(2**63) - 1, 1.0, True, "1"]],
            *[("stop", x) for x in ["", [""], 3, ["a"] * 5, ["a", 1], "x" * 65, "\udfff", {}]],
            *[("stream", x) for x in [0, 1, "true"]],
            *[("stream_options", x) for x in [{"include_usage": True}, {}, True]],
            *[("n", x) for x in [129, 0, True, 1.0]],
            *[("best_of", x) for x in [2, True]],
            *[("echo", x) for x in ["true", 0]],
            *[("logprobs", x) for x in [0, 5, True]],
            ("suffix", "x"),
            *[("top_k", x) for x in [-2, 1.5, True, "0"]],
            *[("min_p", x) for x in [-0.1, 1.1, True, math.nan]],
            *[("min_tokens", x) for x in [-1, 17, 1.0, True]],
            *[("stop_token_ids", x) for x in [3, [256], [-1], [True], [1] * 65]],
            *[
                ("bad_words", x)
                for x in ["a", [""], [" "], ["x" * 17], [1], ["a"] * 65, ["\ud800"]]
            ],
            *[("repetition_penalty", x) for x in [-1, 0, 11, True]],
            *[("ignore_eos", x) for x in [1, 0, "true"]],
            ("cache_salt", "x" * 257),
            ("cache_salt", 3),
            ("response_format", {"type": "json_object"}),
            *[("presence_penalty", x) for x in [2.5, False, math.nan]],
            ("frequency_penalty", -2.1),
            *[("logit_bias", x) for x in [{"256": -100}, [], {"1": 101}, {"1": True}, {"a": 1}]],
            *[("logit_bias", x) for x in [{"1": 0, "01": 1}, {"²": 1}, {"-1": 1}, {"1": math.nan}]],
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
