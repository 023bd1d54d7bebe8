"""Checks of a chat request, the body of `POST /v1/chat/completions`, and its prompt."""

import json

from eep_jax.runtime.http.checks import RequestError, refusal, unicode, wrong
from eep_jax.runtime.http.completion import (
    CompletionLimits,
    CompletionRequest,
    answer_length,
    check_room,
    choices_of,
    known_fields,
    sampling_fields,
)
from eep_jax.runtime.http.neutral_fields import CHAT
from eep_jax.runtime.http.shaping_fields import SHAPING
from eep_jax.runtime.text.chat_template import ChatTemplate, TemplateRefused

ROLES = ("system", "developer", "user", "assistant", "tool")
MESSAGES_MAX = 1_024
EFFORTS = ("minimal", "low", "medium", "high")

_LENGTHS = ("max_completion_tokens", "max_tokens")  # the second is the former name
_OWN = ("model", "messages", *_LENGTHS, "temperature", "top_p", "seed", "stop", "stream")
_OWN = (*_OWN, "n", "best_of")
_OF_TEMPLATE = ("reasoning_effort", "chat_template_kwargs")
FIELDS = (*_OWN, "stream_options", "cache_salt", *_OF_TEMPLATE, *SHAPING, *CHAT)
# Fields of an answer that a client may send back with the conversation, if empty.
_EMPTY_OF_MESSAGE = ("refusal", "annotations", "audio", "function_call")
# Fields beside role and content, and the roles that have them.
_OF_ROLE = {
    "name": ("system", "developer", "user", "assistant", "tool"),
    "tool_calls": ("assistant",),
    "reasoning_content": ("assistant",),
    "tool_call_id": ("tool",),
}
_RESERVED = ("messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token")


def parse_chat(
    body: object, limits: CompletionLimits, template: ChatTemplate | None
) -> CompletionRequest:
    """The first of `parse_chats`."""
    return parse_chats(body, limits, template)[0]


def parse_chats(
    body: object, limits: CompletionLimits, template: ChatTemplate | None
) -> list[CompletionRequest]:
    """Reads the body, and renders the conversation with the model's template.

    Follows OpenAI's "Create chat completion" reference; unsupported values are refused, never
    ignored. `{"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]}` may have an answer
    as long as the context allows. `chat_template_kwargs` are arguments of the template, such as
    `{"enable_thinking": false}`. There is one request for each of the n choices.

    Raises:
      RequestError: names the field, within a message as `messages[0].content`.
    """
    fields = known_fields(body, FIELDS, CHAT, limits)
    messages, arguments, prompt = rendered(fields, limits, template)
    if not prompt:
        raise refusal("messages", "have no tokens after the model's chat template; send some text")
    check_room("messages", prompt, limits)
    room = limits.context_tokens - len(prompt)
    length = answer_length(fields, _length(fields), len(prompt), room, limits)
    request = CompletionRequest(
        prompt=prompt,
        max_tokens=length,
        chat=True,
        conversation=json.dumps([messages, arguments]),
        **sampling_fields(fields, limits, length),
    )
    return choices_of(fields, [request], limits)


def rendered(
    fields: dict, limits: CompletionLimits, template: ChatTemplate | None
) -> tuple[list[dict], dict, tuple[int, ...]]:
    """The checked messages and template arguments, and the tokens of their prompt."""
    if template is None:
        message = (
            f"messages: the model {limits.model!r} has no chat template (chat_template.jinja, or "
            "chat_template in tokenizer_config.json); send a prompt to /v1/completions instead"
        )
        raise RequestError(400, "messages", message, code="no_chat_template")
    messages, arguments = _messages(fields, template), _template_arguments(fields, template)
    try:
        text = template.render(messages, **arguments)
        unicode("messages", text)
        prompt = limits.tokenizer.encode_rendered(text)
    except (TemplateRefused, ValueError) as error:
        if isinstance(error, RequestError):
            raise
        problem = f"are refused by the model's chat template: {error}"
        raise refusal("messages", problem) from None
    return messages, arguments, prompt


def _length(fields: dict) -> str:
    """The name under which the request has the length of the answer."""
    new, old = _LENGTHS
    if new in fields and fields.get(old, fields[new]) != fields[new]:
        raise wrong(old, fields[old], f"{new} is {fields[new]!r:.40}; send one of them")
    return old if old in fields and new not in fields else new


def _messages(fields: dict, template: ChatTemplate) -> list[dict]:
    messages = fields.get("messages")
    if not isinstance(messages, list) or not 0 < len(messages) <= MESSAGES_MAX:
        raise wrong("messages", messages, f"send a list of 1 to {MESSAGES_MAX} messages")
    return [_message(m, f"messages[{i}]", template) for i, m in enumerate(messages)]


def _message(message: object, where: str, template: ChatTemplate) -> dict:
    if not isinstance(message, dict):
        raise wrong(where, message, 'send an object like {"role": "user", "content": "Hi"}')
    fields = {name: value for name, value in message.items() if value is not None}
    role = fields.get("role")
    if role not in ROLES:
        raise wrong(f"{where}.role", role, f"send one of {', '.join(ROLES)}")
    for name in _EMPTY_OF_MESSAGE:
        if fields.pop(name, None):
            raise refusal(f"{where}.{name}", "is not supported by this service; leave it out")
    for name in _OF_ROLE.keys() & fields.keys():
        if fields[name] in ("", []):
            del fields[name]
        elif role not in _OF_ROLE[name]:
            raise refusal(f"{where}.{name}", f"is no field of a message of {role}; leave it out")
    if unknown := sorted(fields.keys() - {"role", "content", *_OF_ROLE}):
        known = ", ".join(("role", "content", *_OF_ROLE))
        raise refusal(f"{where}.{unknown[0]}", f"is not a field of a message; use {known}")
    fields |= _role_fields(fields, where)
    fields["content"] = _content_of(fields, f"{where}.content")
    if role == "developer" and role not in template.reads.strings:
        fields["role"] = "system"  # the former name of the role
    _check_read(fields, where, template)
    return fields


def _check_read(fields: dict, where: str, template: ChatTemplate) -> None:
    """Refuses what the template would leave out of the prompt."""
    if not template.reads.role(fields["role"]):
        problem = f"{fields['role']!r} has no place in this model's template; use another role"
        raise refusal(f"{where}.role", problem)
    for name in _OF_ROLE.keys() & fields.keys():
        # The id of a call orders messages; many templates order them by place alone.
        if name != "tool_call_id" and not template.reads.field(name):
            raise refusal(f"{where}.{name}", "has no place in this model's template; leave it out")


def _role_fields(fields: dict, where: str) -> dict:
    """The checked fields that only some roles have."""
    for name in ("name", "tool_call_id", "reasoning_content"):
        if name not in fields:
            continue
        if not isinstance(fields[name], str):
            raise wrong(f"{where}.{name}", fields[name], "send a string")
        unicode(f"{where}.{name}", fields[name])
    if "tool_calls" not in fields:
        return {}
    calls = fields["tool_calls"]
    if not isinstance(calls, list):
        raise wrong(f"{where}.tool_calls", calls, "send a list of calls, as an answer had them")
    named = [(call, f"{where}.tool_calls[{index}]") for index, call in enumerate(calls)]
    return {"tool_calls": [_tool_call(call, name) for call, name in named]}


def _tool_call(call: object, where: str) -> dict:
    """A call with its arguments as an object: templates write them as JSON themselves."""
    form = '{"id": "...", "type": "function", "function": {"name": "f", "arguments": "{}"}}'
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise wrong(where, call, f"send {form}")
    if call.get("type", "function") != "function":
        raise wrong(f"{where}.type", call["type"], "send function")
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError) as error:
            raise refusal(f"{where}.function.arguments", f"is not JSON ({error})") from None
    if not isinstance(arguments, dict):
        expected = "send an object, or the text of one"
        raise wrong(f"{where}.function.arguments", function["arguments"], expected)
    return call | {"type": "function", "function": function | {"arguments": arguments}}


def _content_of(fields: dict, where: str) -> str:
    """The text of a message; one that calls tools may have none."""
    may_lack = fields["role"] == "assistant" and fields.keys() & {"tool_calls", "reasoning_content"}
    if may_lack and fields.get("content") in (None, []):
        return ""
    return _content(fields.get("content"), where)


def _content(content: object, where: str) -> str:
    """The text of a message: a string, or a list of text parts."""
    if isinstance(content, str):
        unicode(where, content)
        return content
    if not isinstance(content, list) or not content:
        raise wrong(where, content, 'send a string, or a list of {"type": "text", "text": ...}')
    texts = []
    for index, part in enumerate(content):
        name = f"{where}[{index}]"
        if not isinstance(part, dict) or part.get("type") != "text":
            raise wrong(name, part, "this service takes parts of type text only")
        if not isinstance(part.get("text"), str) or part.keys() - {"type", "text"}:
            raise wrong(name, part, 'send {"type": "text", "text": "..."}')
        unicode(name, part["text"])
        texts.append(part["text"])
    return "".join(texts)


def _template_arguments(fields: dict, template: ChatTemplate) -> dict:
    arguments = fields.get("chat_template_kwargs", {})
    if not isinstance(arguments, dict):
        raise wrong("chat_template_kwargs", arguments, 'send an object like {"name": true}')
    for name, value in arguments.items():
        field = f"chat_template_kwargs.{name}"
        if name in _RESERVED or not name.isidentifier():
            raise refusal(field, "is not an argument that a request may set")
        if not template.takes(name):
            raise refusal(field, "has no place in this model's template; leave it out")
        if not isinstance(value, str | int | float | bool | None):
            raise wrong(field, value, "send a string, a number or a boolean")
    effort = fields.get("reasoning_effort")
    if effort is None:
        return arguments
    if effort not in EFFORTS or not template.takes("reasoning_effort"):
        expected = f"one of {', '.join(EFFORTS)}, where the model's template has such an argument"
        raise wrong("reasoning_effort", effort, f"send {expected}; else leave it out")
    return arguments | {"reasoning_effort": effort}
