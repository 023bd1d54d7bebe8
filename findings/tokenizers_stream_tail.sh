#!/usr/bin/env bash
# Package: tokenizers 0.23.3
# Seen: `DecodeStream` holds back the bytes of an incomplete character and has no method that
#   returns them. If generation ends there (a token limit, a stop), the streamed text is shorter
#   than `Tokenizer.decode` of the same ids.
# Expected: A flush or finish method, or the text of the last step.
# Instead: At the end decode all ids at once and send what the stream has not sent.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for python in ${PYTHON:-python3.12 python3.13 python3}; do
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null && break
    python=
done
"${python:?needs Python 3.12 or newer: set PYTHON}" -m venv "$work/venv"
"$work/venv/bin/pip" install -qq --no-compile tokenizers==0.23.3
"$work/venv/bin/python" - <<'PY'
import tokenizers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.decoders import DecodeStream

alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.decoder = decoders.ByteLevel()
ids = tokenizer.encode("caf\u00e9").ids[:-1]  # ends between the two bytes of a letter
stream = DecodeStream()
streamed = "".join(stream.step(tokenizer, id) or "" for id in ids)
whole = tokenizer.decode(ids)
verbs = [name for name in dir(DecodeStream) if not name.startswith("_")]
version = tokenizers.__version__
print(f"tokenizers {version}: streamed {streamed!r}, decode {whole!r}, methods {verbs}")
assert streamed == "caf" and whole == "caf\ufffd" and verbs == ["step"]
PY
