"""tokenizer.json of a Hugging Face directory, through the `tokenizers` library.

Three kinds of decoders are read as bytes per token (`_byte_level`, `_byte_fallback`, `_replaced`),
so that an answer's text grows token by token, exactly and at a constant cost.
"""

import functools
import json
import pathlib
import re

import tokenizers

from eep_jax.runtime.text.tokenizer import TOKENIZER_FILE, PieceDecoder

CONFIG_FILE = "tokenizer_config.json"
ADDED_FILE = "added_tokens.json"
NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")


class HFTokenizer:
    """A `tokenizers.Tokenizer` as a `tokenizer.Tokenizer`.

    `named` has the texts of its special tokens: `{"bos_token": "<s>", ...}`.
    """

    def __init__(self, directory: pathlib.Path):
        path = directory / TOKENIZER_FILE
        try:
            spec = path.read_text()
            self._inner = tokenizers.Tokenizer.from_str(spec)
            decoder = json.loads(spec).get("decoder") or {}
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{path} cannot be read as a tokenizer: {error}") from error
        # A file may come with the settings of a training run.
        self._inner.no_truncation()
        self._inner.no_padding()
        self.config = read_tokenizer_config(directory)
        self.named = named_tokens(directory, self.config)
        _add_tokens(self._inner, directory, self.config, self.named)
        added = self._inner.get_added_tokens_decoder()
        self._special = frozenset(i for i, token in added.items() if token.special)
        self.vocab_size = 1 + max(self._inner.get_vocab(with_added_tokens=True).values())
        end = self._inner.token_to_id(self.named.get("eos_token", ""))
        self.end_tokens = frozenset() if end is None else frozenset({end})
        self._bos = self._bos_to_add()
        self.has_bos = bool(self.encode(""))
        try:
            self._piece, self._strips, self._first_piece = _pieces(decoder)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        self._bytes = functools.cache(lambda token: self._bytes_of(token, self._piece))

    def encode(self, text: str) -> tuple[int, ...]:
        if self._bos is None:
            return self._encode(text, "add_bos_token" not in self.config)
        return (self._bos, *self._encode(text, False))

    def encode_rendered(self, text: str) -> tuple[int, ...]:
        return self._encode(text, False)

    def complete(self, ids: tuple[int, ...]) -> tuple[int, ...]:
        return ids

    def decoder(self, after: tuple[int, ...] = ()):
        begins = not any(self._bytes(token) for token in after)
        if begins and self._first_piece is not None:
            return _FirstApart(self._bytes, lambda token: self._bytes_of(token, self._first_piece))
        return _Stripped(self._bytes, self._strips if begins else 0)

    def _encode(self, text: str, special: bool) -> tuple[int, ...]:
        # encode_batch releases the GIL, unlike encode.
        (encoding,) = self._inner.encode_batch([text], add_special_tokens=special)
        return tuple(encoding.ids)

    def _bos_to_add(self) -> int | None:
        """The id of the BOS that `add_bos_token` asks for; None leaves it to tokenizer.json."""
        if not self.config.get("add_bos_token"):
            return None
        token = self._inner.token_to_id(self.named.get("bos_token", ""))
        if token is None:
            raise ValueError(
                f"{CONFIG_FILE} says add_bos_token, but its bos_token "
                f"{self.named.get('bos_token')!r} is not a token of {TOKENIZER_FILE}"
            )
        return token

    def _bytes_of(self, token: int, piece) -> bytes:
        text = None if token in self._special else self._inner.id_to_token(token)
        return b"" if text is None else piece(text)


class _Stripped(PieceDecoder):
    """A PieceDecoder that drops up to `strips` leading spaces of a text."""

    def __init__(self, piece, strips: int):
        super().__init__(piece)
        self._strips = strips

    def feed(self, token: int) -> str:
        text = super().feed(token)
        while self._strips and text:
            if text[0] != " ":
                self._strips = 0
                break
            text, self._strips = text[1:], self._strips - 1
        return text


class _FirstApart(PieceDecoder):
    """A PieceDecoder that reads the first token with text by `first`."""

    def __init__(self, piece, first):
        super().__init__(piece)
        self._first = first

    def feed(self, token: int) -> str:
        if self._first is None or not self._piece(token):
            return super().feed(token)
        first, self._first = self._first, None
        return self._decoder.decode(first(token))


def read_tokenizer_config(directory: pathlib.Path) -> dict:
    """tokenizer_config.json; {} if missing. Raises ValueError if it is not a JSON object."""
    path = directory / CONFIG_FILE
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds {type(found).__name__}, expected a JSON object")
    return found


def named_tokens(directory: pathlib.Path, config: dict) -> dict[str, str]:
    """Texts of the special tokens that a chat template may name."""
    path = directory / "special_tokens_map.json"
    try:
        found = json.loads(path.read_text()) if path.is_file() else {}
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    named = {}
    for name in NAMED_TOKENS:
        token = config.get(name) or found.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            named[name] = token
    return named


def _add_tokens(
    inner: tokenizers.Tokenizer, directory: pathlib.Path, config: dict, named: dict[str, str]
) -> None:
    """Adds the tokens that stand only in tokenizer_config.json or added_tokens.json, by their id.

    Raises ValueError where the library would give one another id.
    """
    known = {token.content for token in inner.get_added_tokens_decoder().values()}
    for token_id, fields in sorted(_listed_tokens(directory, config).items()):
        if (text := fields["content"]) in known:
            continue
        special = bool(fields.get("special", text in named.values()))
        how = {name: bool(fields.get(name, False)) for name in ("lstrip", "rstrip", "single_word")}
        how["normalized"] = bool(fields.get("normalized", not special))
        token = tokenizers.AddedToken(text, special=special, **how)
        (inner.add_special_tokens if special else inner.add_tokens)([token])
        if (found := inner.token_to_id(text)) != token_id:
            raise ValueError(
                f"{directory} says that {text!r:.60} has the id {token_id}, but behind the tokens "
                f"of {TOKENIZER_FILE} it gets {found}; save the tokenizer anew with transformers"
            )


def _listed_tokens(directory: pathlib.Path, config: dict) -> dict[int, dict]:
    """Fields of the added tokens by id: `{7: {"content": "<think>", "special": True}}`."""
    path, found = directory / ADDED_FILE, {}
    try:
        if path.is_file():
            ids = json.loads(path.read_text())
            found = {int(token): {"content": str(text)} for text, token in ids.items()}
        path = directory / CONFIG_FILE
        for token, fields in (config.get("added_tokens_decoder") or {}).items():
            found[int(token)] = {**fields, "content": str(fields["content"])}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path}: its added tokens cannot be read: {error!r}") from error
    return found


def _pieces(decoder: dict):
    """Reading of the `decoder` of a tokenizer.json.

    Returns:
        token text -> bytes; leading spaces of the whole text to strip; the same function for a
        text's first token, or None where that is no other.

    Raises:
        ValueError: A decoder of another kind.
    """
    steps = decoder.get("decoders", [decoder])
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"]:
        return _byte_level, 0, None
    if kinds in (["Metaspace"], ["ByteFallback", "Metaspace"]):
        space, keeps = steps[-1].get("replacement", "▁"), steps[-1].get("prepend_scheme") == "never"
        read = _byte_fallback if len(kinds) == 2 else _replaced
        piece, first = (functools.partial(read, replaced=[(space, new)]) for new in (" ", ""))
        return piece, 0, None if keeps else first
    replaced = [
        (s["pattern"].get("String"), s["content"]) for s in steps if s.get("type") == "Replace"
    ]
    strips = [s for s in steps if s.get("type") == "Strip"]
    if (
        "ByteFallback" not in kinds
        or set(kinds) - {"Replace", "ByteFallback", "Fuse", "Strip"}
        or any(old is None for old, _ in replaced)
        or any(strip["content"] != " " or strip["stop"] for strip in strips)
        or len(strips) > 1
    ):
        raise ValueError(
            f"its decoder is {json.dumps(decoder):.300}; supported are ByteLevel, Metaspace (after "
            "ByteFallback or alone), and a sequence with ByteFallback of Replace (of strings), "
            "Fuse and one Strip (of leading spaces)"
        )
    piece = functools.partial(_byte_fallback, replaced=replaced)
    return piece, strips[0]["start"] if strips else 0, None


def _byte_level(text: str) -> bytes:
    """GPT-2's spelling of bytes as printable characters: "Ġa" is b" a"."""
    letters = _byte_letters()
    if all(char in letters for char in text):
        return bytes(letters[char] for char in text)
    return text.encode()  # an added token, spelt literally


@functools.cache
def _byte_letters() -> dict[str, int]:
    """Printable bytes stand for themselves, the others for the characters from U+0100 on."""
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in own]
    letters = {chr(byte): byte for byte in own}
    return letters | {chr(256 + n): byte for n, byte in enumerate(others)}


def _byte_fallback(text: str, replaced) -> bytes:
    """SentencePiece's spelling: "▁a" is b" a", "<0x0A>" is a byte."""
    if byte := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", text):
        return bytes.fromhex(byte[1])
    return _replaced(text, replaced)


def _replaced(text: str, replaced) -> bytes:
    """UTF-8 of a token's text after these replacements of strings."""
    for old, new in replaced:
        text = text.replace(old, new)
    return text.encode()
