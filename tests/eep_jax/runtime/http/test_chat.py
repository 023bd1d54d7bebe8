"""Conversations become prompts by the model's own template; what cannot be honoured is refused."""

import json

import pytest

from eep_jax.runtime.http.chat import parse_chat
from eep_jax.runtime.http.checks import RequestError
from eep_jax.runtime.http.completion import CompletionLimits
from eep_jax.runtime.text.chat_template import ChatTemplate, TemplateRefused, open_chat_template
from tests.support.hf_tokenizers import CHATML, write_tokenizer

LIMITS = CompletionLimits(model="tiny", context_tokens=256)
TEMPLATE = ChatTemplate(CHATML, {})
HI = {"role": "user", "content": "Hi"}


def a_call(**function) -> dict:
    """A turn that calls a tool."""
    function = {"name": "add", "arguments": '{"a": 2}'} | function
    call = {"id": "1", "type": "function", "function": function}
    return {"role": "assistant", "content": None, "tool_calls": [call]}


ASKS = a_call()


def body(**fields) -> dict:
    return {"model": "tiny", "messages": [HI]} | fields


def refused(sent: object, template=TEMPLATE) -> RequestError:
    with pytest.raises(RequestError) as caught:
        parse_chat(sent, LIMITS, template)
    return caught.value


def prompt(sent: dict, template=TEMPLATE) -> str:
    return bytes(parse_chat(sent, LIMITS, template).prompt).decode()


class TestParseChat:
    def test_the_prompt_ends_where_the_assistant_begins(self):
        system = {"role": "system", "content": "Be brief."}
        assert prompt(body(messages=[system, HI])) == (
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
            "<|im_start|>assistant\n"
        )

    def test_an_answer_may_be_as_long_as_the_context_allows(self):
        request = parse_chat(body(), LIMITS, TEMPLATE)
        assert request.max_tokens == LIMITS.context_tokens - len(request.prompt)
        assert request.chat and request.temperature == 1.0

    @pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
    def test_both_names_of_the_length_are_known(self, name):
        assert parse_chat(body(**{name: 5}), LIMITS, TEMPLATE).max_tokens == 5
        assert refused(body(**{name: 1000})).field == name
        assert refused(body(max_tokens=3, max_completion_tokens=4)).field == "max_tokens"
        both = parse_chat(body(max_tokens=4, max_completion_tokens=4), LIMITS, TEMPLATE)
        assert both.max_tokens == 4

    def test_parts_of_text_are_joined(self):
        parts = [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]
        assert prompt(body(messages=[{"role": "user", "content": parts}])) == prompt(body())

    def test_an_answer_may_be_sent_back_as_the_client_library_has_it(self):
        answer = {"role": "assistant", "content": "Hello", "refusal": None, "annotations": []}
        answer |= {"audio": None, "function_call": None, "tool_calls": None}
        assert "assistant\nHello" in prompt(body(messages=[HI, answer, HI]))

    def test_the_developer_is_the_system_of_older_templates(self):
        rule = {"role": "developer", "content": "Be brief."}
        assert "system\nBe brief." in prompt(body(messages=[rule, HI]))
        assert "system\nBe brief." in prompt(
            body(messages=[rule, HI]), ChatTemplate(CHATML + "{# developer #}", {})
        )
        newer = ChatTemplate(CHATML + "{% if messages[0].role == 'developer' %}{% endif %}", {})
        assert "developer\nBe brief." in prompt(body(messages=[rule, HI]), newer)

    def test_arguments_of_the_template_are_passed_on(self):
        template = ChatTemplate("{{ messages[0].content }}{{ enable_thinking }}", {})
        sent = body(chat_template_kwargs={"enable_thinking": False})
        assert prompt(sent, template) == "HiFalse"
        effort = ChatTemplate("{{ reasoning_effort or 'none' }}", {})
        assert prompt(body(reasoning_effort="low"), effort) == "low"

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            *[("messages", x) for x in [None, [], "Hi", {}, [HI] * 1025]],
            *[("tools", x) for x in [[{"type": "function"}], {}]],
            *[("tool_choice", x) for x in ["required", {"type": "function"}]],
            ("functions", [{}]),
            *[("response_format", x) for x in [{"type": "json_object"}, "text"]],
            *[("logprobs", x) for x in [True, 1]],
            ("top_logprobs", 5),
            ("n", 129),
            ("presence_penalty", 3),
            ("logit_bias", {"5": 101}),
            ("modalities", ["text", "audio"]),
            ("temperature", 3),
            ("top_p", 0),
            ("seed", "1"),
            ("stop", [""]),
            ("stream_options", {"include_usage": True}),
            ("prompt", "Hi"),
            ("max_tokens", 0),
            ("reasoning_effort", "low"),
            ("verbosity", "low"),
            ("chat_template_kwargs", []),
        ],
    )
    def test_a_refusal_names_the_field(self, field, value):
        error = refused(body(**{field: value}))
        assert (error.status, error.field) == (400, field)
        assert field in str(error) and len(str(error)) < 600

    @pytest.mark.parametrize(
        ("message", "field"),
        [
            ("Hi", "messages[1]"),
            ({"content": "Hi"}, "messages[1].role"),
            ({"role": "function", "content": "4"}, "messages[1].role"),
            ({"role": "tool"}, "messages[1].content"),
            ({"role": "tool", "content": "4", "tool_calls": [1]}, "messages[1].tool_calls"),
            ({"role": "user"}, "messages[1].content"),
            ({"role": "user", "content": 3}, "messages[1].content"),
            ({"role": "user", "content": []}, "messages[1].content"),
            ({"role": "user", "content": "a\ud800"}, "messages[1].content"),
            (HI | {"content": [{"type": "image_url"}]}, "messages[1].content[0]"),
            (HI | {"content": [{"type": "text", "text": 3}]}, "messages[1].content[0]"),
            (HI | {"name": "Ann"}, "messages[1].name"),
            (HI | {"weight": 1}, "messages[1].weight"),
            (ASKS | {"tool_calls": [{}]}, "messages[1].tool_calls[0]"),
            (ASKS | {"tool_calls": {}}, "messages[1].tool_calls"),
            (ASKS, "messages[1].tool_calls"),
            (a_call(arguments="{"), "messages[1].tool_calls[0].function.arguments"),
            (a_call(arguments="3"), "messages[1].tool_calls[0].function.arguments"),
            ({"role": "assistant", "reasoning_content": "so"}, "messages[1].reasoning_content"),
            ({"role": "assistant"}, "messages[1].content"),
        ],
    )
    def test_a_refusal_names_the_part_of_a_message(self, message, field):
        assert refused(body(messages=[HI, message])).field == field

    def test_tools_were_called_and_answered(self):
        template = ChatTemplate(
            "{% for m in messages %}{% for c in m.tool_calls or [] %}{{ c.function | tojson }}"
            "{% endfor %}{{ m.reasoning_content }}{{ m.content }}|{% endfor %}",
            {},
        )
        asks = {name: ASKS[name] for name in ("role", "tool_calls")} | {"reasoning_content": "so"}
        tells = {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "4"}]}
        found = prompt(body(messages=[HI, asks, asks | {"content": None}, tells]), template)
        call = 'so|{"name": "add", "arguments": {"a": 2}}'
        assert found == 'Hi|{"name": "add", "arguments": {"a": 2}}' + call + "so|4|"

    def test_a_role_without_a_place_in_the_template_is_refused(self):
        only = "{# system #}{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}"
        template = ChatTemplate(only + "{% endif %}{% endfor %}", {})
        assert prompt(body(), template) == "Hi"
        for role in ("system", "developer", "assistant", "tool"):
            error = refused(body(messages=[HI, {"role": role, "content": "x"}]), template)
            assert error.field == "messages[1].role" and role in str(error).replace("system", role)

    @pytest.mark.parametrize("name", ["messages", "tools", "bos_token", "unheard_of", "a b"])
    def test_arguments_that_a_request_may_not_set(self, name):
        error = refused(body(chat_template_kwargs={name: 1}))
        assert error.field == f"chat_template_kwargs.{name}"

    def test_a_model_without_a_template_says_so(self):
        error = refused(body(), template=None)
        assert (error.status, error.code) == (400, "no_chat_template")
        assert "/v1/completions" in str(error)

    def test_what_the_template_refuses_is_passed_on(self):
        template = ChatTemplate("{{ raise_exception('roles must alternate') }}", {})
        error = refused(body(), template)
        assert error.field == "messages" and "roles must alternate" in str(error)

    def test_a_conversation_that_is_too_long(self):
        error = refused(body(messages=[HI | {"content": "x" * 300}]))
        assert (error.field, error.code) == ("messages", "context_length_exceeded")


class TestTemplate:
    def render(self, source: str, **arguments) -> str:
        return ChatTemplate(source, {"bos_token": "<s>"}).render([HI], **arguments)

    def test_the_names_that_templates_use(self):
        assert self.render("{{ bos_token }}{{ messages[0]['role'] }}") == "<s>user"
        assert self.render("{{ messages | tojson }}") == json.dumps([HI])
        assert self.render("{{ {'a': '<é>'} | tojson }}") == '{"a": "<é>"}'
        assert len(self.render("{{ strftime_now('%Y-%m-%d') }}")) == 10
        assert self.render("{% if tools is none %}none{% endif %}") == "none"
        assert self.render("{% if tools %}some{% endif %}x") == "x"
        assert self.render("{% generation %}a{% endgeneration %}") == "a"
        looped = "{% for m in [1, 2, 3] %}{% if m == 2 %}{% break %}{% endif %}{{ m }}{% endfor %}"
        assert self.render(looped) == "1"

    def test_blocks_leave_no_lines_behind(self):
        assert self.render("{% if true %}\n  {% set x = 1 %}\na{% endif %}") == "a"

    @pytest.mark.parametrize(
        "source",
        [
            "{{ ''.__class__.__mro__ }}",
            "{{ messages.append(1) }}",
            "{{ cycler.__init__.__globals__ }}",
            "{{ none + 'a' }}",
            "{{ ''.join(range(10 ** 9)) }}",
            "{{ 'x' * (5 * 1024 * 1024) }}",
        ],
    )
    def test_the_sandbox_and_the_template_s_own_mistakes(self, source):
        with pytest.raises(TemplateRefused):
            self.render(source)

    @pytest.mark.parametrize(
        "form",
        [CHATML, [{"name": "tool_use", "template": "x"}, {"name": "default", "template": CHATML}]],
    )
    def test_where_a_template_is_found(self, tmp_path, form):
        assert open_chat_template(None) is None
        write_tokenizer(tmp_path, chat_template=form, bos_token={"content": "<s>"})
        assert "user\nHi" in open_chat_template(tmp_path).render([HI])
        (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}file")
        assert open_chat_template(tmp_path).render([HI]) == "<s>file"

    def test_no_template(self, tmp_path):
        assert open_chat_template(write_tokenizer(tmp_path, bos_token="<s>")) is None

    @pytest.mark.parametrize(
        "found", ["{% if %}", 3, [{"name": "rag", "template": "x"}], [{"template": "x"}], ["x"]]
    )
    def test_a_damaged_template_is_named(self, tmp_path, found):
        write_tokenizer(tmp_path, chat_template=found)
        with pytest.raises(ValueError, match=r"tokenizer_config\.json"):
            open_chat_template(tmp_path)
