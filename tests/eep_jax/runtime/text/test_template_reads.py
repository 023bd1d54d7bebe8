"""Reads of a template are found in its syntax, not in its letters."""

import pytest

from eep_jax.runtime.text.chat_template import ChatTemplate

QWEN = """{%- if tools %}<tools>{{ tools | tojson }}</tools>{%- endif %}
{%- if messages[0].role == 'system' %}<|im_start|>system
{{ messages[0].content }}<|im_end|>{%- endif %}
{%- set ns = namespace(last=0) %}
{%- for message in messages[::-1] %}{% if message.role == "user" %}{% set ns.last = 1 %}{% endif %}
{%- endfor %}
{%- for message in messages %}
{%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
<|im_start|>{{ message.role }}
{{ message.content }}
{%- elif message.role == "assistant" %}
{%- if message.reasoning_content is string %}<think>{{ message.reasoning_content }}{% endif %}
{%- for tool_call in message.tool_calls %}{{ tool_call.name }}{{ tool_call.arguments | tojson }}
{%- endfor %}
{%- elif message.role == "tool" %}<tool_response>{{ message.content }}</tool_response>
{%- endif %}{%- endfor %}
{%- if enable_thinking is defined and enable_thinking is false %}<think></think>{%- endif %}"""
STRICT = """{% if messages[0]["role"] == "system" %}{% set rule = messages[0]["content"] %}
{% set rest = messages[1:] %}{% else %}{% set rest = messages %}{% endif %}
{% for m in rest %}{% if m["role"] == "user" %}[INST]{{ rule }}{{ m["content"] }}[/INST]
{% elif m["role"] == "assistant" %}{{ m["content"] }}
{% else %}{{ raise_exception("Only user and assistant roles, with no name, are supported") }}
{% endif %}{% endfor %}"""
USER_ONLY = "{# system, name #}{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}"
USER_ONLY += "{% endif %}{% endfor %}"


def reads(source: str):
    return ChatTemplate(source, {}).reads


def test_a_template_of_qwens_kind():
    found = reads(QWEN)
    assert found.fields == {"role", "content", "reasoning_content", "tool_calls"}
    assert all(found.role(role) for role in ("system", "user", "assistant", "tool"))
    assert not found.field("name"), "that of a tool call is no field of a message"


def test_a_template_that_refuses_other_roles():
    found = reads(STRICT)
    assert found.fields == {"role", "content"}
    assert found.role("system") and not found.role("tool") and not found.role("developer")


def test_words_in_comments_and_texts_are_not_read():
    found = reads(USER_ONLY + "system developer name")
    assert found.role("user") and not found.role("system") and not found.role("developer")
    assert found.fields == {"role", "content"}


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[0].content }}",
        "{% for m in messages %}<|{{ m['role'] }}|>{{ m.content }}{% endfor %}",
        "{% for m in messages %}{% if m.role == 'a' %}U{% else %}{{ m.content }}{% endif %}"
        "{% endfor %}",
        "{% for m in messages %}{% if m.role == 'a' %}{% set r = 1 %}{% else %}{% set r = m.role %}"
        "{% endif %}{{ r }}{% endfor %}",
        "{% for m in messages %}{% if m.role != 'x' %}{{ '<' + m.role }}{% endif %}{% endfor %}",
    ],
)
def test_a_role_that_is_never_asked_for_or_has_an_else_may_be_any(source):
    assert reads(source).role("developer")


@pytest.mark.parametrize(
    "source",
    [
        "{% for m in messages %}{{ m.get('name') }}{% endfor %}",
        "{% set first = messages | first %}{{ first['name'] }}",
        "{{ (messages | last).name }}",
        "{% macro say(m) %}{{ m.name }}{% endmacro %}{{ say(messages[0]) }}",
        "{% macro say(m) %}{{ m.name }}{% endmacro %}{{ say(m=messages[0]) }}",
        "{% set ns = namespace(m=none) %}{% set ns.m = messages[0] %}{{ ns.m.name }}",
        "{% for m in messages %}{{ loop.previtem.name }}{% endfor %}",
        "{{ messages | map(attribute='name') | join }}",
        "{{ messages | tojson }}",
        "{{ messages[0] }}",
        "{% for m in messages if m.name %}{{ m.content }}{% endfor %}",
        "{% for key, value in messages[0].items() %}{{ value }}{% endfor %}",
    ],
)
def test_every_way_to_a_field(source):
    assert reads(source).field("name")


@pytest.mark.parametrize(
    ("source", "taken"),
    [
        ("{{ x.thinking }}{# thinking #}thinking{% set t = 'thinking' %}", False),
        ("{% set thinking = true %}{{ thinking }}", False),
        ("{% set thinking = thinking if thinking is defined else true %}{{ thinking }}", True),
        ("{% if not thinking is defined %}{% set thinking = 1 %}{% endif %}", True),
        ("{% for m in messages %}{{ m.content if thinking else '' }}{% endfor %}", True),
        ("{% macro f() %}{{ thinking }}{% endmacro %}{{ f() }}", True),
    ],
)
def test_an_argument_is_a_variable_that_the_template_does_not_set_itself(source, taken):
    assert ChatTemplate(source, {}).takes("thinking") == taken
