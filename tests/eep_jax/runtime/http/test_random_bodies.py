"""Any body is read, or refused with a status of 4xx and the name of the field."""

import json

from hypothesis import given, settings
from hypothesis import strategies as st

from eep_jax.runtime.http import chat, completion
from eep_jax.runtime.http.checks import RequestError
from eep_jax.runtime.http.tokens import DETOKENIZE, TOKENIZE, detokenize, tokenize
from eep_jax.runtime.text.chat_template import ChatTemplate

LIMITS = completion.CompletionLimits(model="tiny", context_tokens=64)
TEMPLATE = ChatTemplate("{{ messages | tojson }}{{ enable_thinking }}", {})

texts = st.text(max_size=6) | st.sampled_from(["tiny", "Hi", "user", "tool", "auto", "\ud800"])
numbers = st.integers() | st.integers(-3, 9) | st.floats() | st.sampled_from([1e400, 10**400])
scalars = st.none() | st.booleans() | numbers | texts
keys = st.sampled_from(["role", "content", "type", "text", "name", "tool_calls", "function"])
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(keys | st.integers(0, 300).map(str) | texts, inner, max_size=3)
    ),
    max_leaves=8,
)
some_messages = st.lists(st.dictionaries(keys, values, max_size=4), min_size=1, max_size=3)


def bodies(base: dict, fields) -> st.SearchStrategy:
    """`base` with some known fields, and sometimes an unknown one, of any value."""
    changed = st.dictionaries(st.sampled_from(sorted(fields)) | texts, values, max_size=4)
    return changed.map(lambda some: base | some)


def check(read, body: object) -> None:
    try:
        found = read(body)
    except RequestError as error:
        assert 400 <= error.status < 500
        names = [str(name)[:80] for name in body]
        assert error.field is not None
        # Of the field itself, or of a part of it: `messages[0].content`.
        absent = error.field in ("prompt", "messages", "tokens")
        assert absent or any(error.field.startswith(name) for name in names)
        assert error.field in str(error) and len(str(error)) < 700
        json.dumps(str(error))
    else:
        assert found is not None


@given(bodies({"model": "tiny", "prompt": "Hi"}, completion.FIELDS))
@settings(max_examples=300)
def test_completions(body):
    check(lambda sent: completion.parse_requests(sent, LIMITS), body)


@given(bodies({"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]}, chat.FIELDS))
@settings(max_examples=300)
def test_chats(body):
    check(lambda sent: chat.parse_chats(sent, LIMITS, TEMPLATE), body)


@given(some_messages)
@settings(max_examples=300)
def test_messages(messages):
    body = {"model": "tiny", "messages": messages}
    check(lambda sent: chat.parse_chats(sent, LIMITS, TEMPLATE), body)


@given(bodies({"prompt": "Hi"}, TOKENIZE), bodies({"tokens": [1]}, DETOKENIZE))
def test_tokens(to_tokens, to_text):
    check(lambda sent: tokenize(sent, LIMITS, TEMPLATE), to_tokens)
    check(lambda sent: detokenize(sent, LIMITS), to_text)
