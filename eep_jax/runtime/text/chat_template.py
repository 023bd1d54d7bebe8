"""Chat templates: a conversation becomes a prompt by the Jinja template of the model. No JAX.

Templates are written for `transformers.PreTrainedTokenizer.apply_chat_template` (Hugging Face,
"Chat templates"); they run in Jinja's sandbox, with the same names: `messages`,
`add_generation_prompt`, `bos_token` and its like, `raise_exception`, `strftime_now`.
"""

import datetime
import functools
import json
import pathlib

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from eep_jax.runtime.text.template_reads import TemplateReads, reads_of

TEMPLATE_FILE = "chat_template.jinja"
TEMPLATE_JSON = "chat_template.json"  # of some models with processors
DEFAULT = "default"
RENDERED_CHARS_MAX = 4 << 20


class TemplateRefused(ValueError):
    """The template refuses this conversation, for the reason that it gives."""


class ChatTemplate:
    """A compiled template. `named` are the texts of special tokens: `{"bos_token": "<s>"}`.

    Raises ValueError for a template that is not valid Jinja.
    """

    def __init__(self, source: str, named: dict[str, str]):
        self._named = named
        try:
            self._template = _environment().from_string(source)
            tree = _environment().parse(source)
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template is not valid Jinja: {error}") from error

        self.reads: TemplateReads = reads_of(tree)
        self._arguments = meta.find_undeclared_variables(tree)

    def takes(self, argument: str) -> bool:
        """Whether the template reads an argument of this name."""
        return argument in self._arguments

    def render(self, messages: list[dict], **arguments) -> str:
        """The prompt, up to where the assistant's answer begins.

        `[{"role": "user", "content": "Hi"}]` may give "<|user|>Hi<|end|><|assistant|>". Raises
        TemplateRefused with the template's own reason.
        """
        names = self._named | {"tools": None, "documents": None} | arguments
        try:
            text = self._template.render(messages=messages, add_generation_prompt=True, **names)
        except jinja2.TemplateError as error:
            raise TemplateRefused(str(error)) from error
        except Exception as error:  # of an expression in it, such as None + "text"
            raise TemplateRefused(f"{type(error).__name__}: {error}") from error
        if len(text) > RENDERED_CHARS_MAX:
            raise TemplateRefused(
                f"it gives a prompt of {len(text)} characters, at most {RENDERED_CHARS_MAX} are "
                "taken; shorten the conversation"
            )
        return text


def open_chat_template(directory: pathlib.Path | None) -> ChatTemplate | None:
    """Opens the template of a model's directory; None if it has none.

    Searched in Hugging Face's order: chat_template.jinja, then `chat_template` of
    tokenizer_config.json, a string or a list of `{"name": ..., "template": ...}` with a "default".
    Raises ValueError, naming the file, for anything else.
    """
    from eep_jax.runtime.text.hf_tokenizer import CONFIG_FILE, named_tokens, read_tokenizer_config

    if directory is None:
        return None
    config = read_tokenizer_config(directory)
    file = directory / TEMPLATE_FILE
    where, found = (file, file.read_text()) if file.is_file() else (None, None)
    if found is None:
        where, found = directory / CONFIG_FILE, config.get("chat_template")
    if found is None and (file := directory / TEMPLATE_JSON).is_file():
        where, found = file, json.loads(file.read_text()).get("chat_template")
    if isinstance(found, list):
        found = _default_of(found, where)
    if found is None:
        return None
    if not isinstance(found, str):
        raise ValueError(f"chat_template of {where} is {type(found).__name__}, expected a string")
    try:
        return ChatTemplate(found, named_tokens(directory, config))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _default_of(templates: list, where: pathlib.Path) -> str:
    try:
        by_name = {entry["name"]: entry["template"] for entry in templates}
    except (TypeError, KeyError) as error:
        raise ValueError(
            f'chat_template of {where} is a list, expected {{"name", "template"}} in each entry'
        ) from error
    if DEFAULT not in by_name:
        raise ValueError(f"chat_template of {where} has {sorted(by_name)}, but no {DEFAULT!r}")
    return by_name[DEFAULT]


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}` marks trained text; it has no effect here."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's own form)

    def parse(self, parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


@functools.cache
def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.filters["tojson"] = _to_json
    return environment


def _raise_exception(message) -> None:
    raise jinja2.TemplateError(str(message))


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    # Jinja's own would escape for HTML.
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )
