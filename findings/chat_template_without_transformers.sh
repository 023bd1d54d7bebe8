#!/usr/bin/env bash
# Package: Jinja2 3.1.6 against transformers 5.23.0
# Seen: A chat template rendered by Jinja2 itself gives other text than transformers, though it
#   looks right: the `tojson` filter of Jinja2 sorts keys and escapes <, >, & and ', so the
#   prompt's tool schemas differ from those of transformers. And `apply_chat_template` returns a
#   mapping, whose `len` is 2, not the number of tokens.
# Expected: The same text once `trim_blocks` and `lstrip_blocks` are set, and a list of token ids.
# Instead: Replace `tojson` by `json.dumps(value, ensure_ascii=False)` in the environment; count
#   tokens by `["input_ids"]`.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for python in ${PYTHON:-python3.12 python3.13 python3}; do
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null && break
    python=
done
"${python:?needs Python 3.12 or newer: set PYTHON}" -m venv "$work/venv"
"$work/venv/bin/pip" install -qq --no-compile transformers==5.23.0 jinja2==3.1.6
"$work/venv/bin/python" - <<'PY'
import json
import jinja2.sandbox
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

template = "{% for m in messages %}{{ m.content }} {% endfor %}{{ tools | tojson }}"
messages = [{"role": "user", "content": "a a a a"}]
tools = [{"type": "f", "about": "a < b & c"}]
words = Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?"))
words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, chat_template=template)
reference = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)
ids = tokenizer.apply_chat_template(messages, tools=tools)

environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
render = lambda: environment.from_string(template).render(messages=messages, tools=tools)
plain = render()
environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
print(f"transformers {transformers.__version__}: {reference}\nJinja2 {jinja2.__version__}: {plain}")
tokens = len(ids["input_ids"])
print(f"apply_chat_template: {type(ids).__name__} of len {len(ids)}, {tokens} tokens")
assert plain != reference and render() == reference
assert "about" in plain and plain.index("about") < plain.index("type") and "u003c" in plain
assert len(ids) == 2 and tokens > 4
PY
