"""Tokenizer protocol of the supervisor, and the tokenizer of models that read plain bytes.

`open.open_tokenizer` chooses a run's tokenizer.
"""

import codecs
from typing import Protocol, runtime_checkable

TOKENIZER_FILE = "tokenizer.json"


@runtime_checkable
class TokenDecoder(Protocol):
    """Decoder of one answer. The results of `feed` and `finish`, joined, are its text."""

    def feed(self, token: int) -> str:
        """Adds a token and returns the text that became certain; half a character is held back."""

    def finish(self) -> str:
        """Returns the rest after the last token; each invalid byte sequence becomes U+FFFD."""


@runtime_checkable
class Tokenizer(Protocol):
    """Text to tokens and back. Its methods may be called from any thread."""

    vocab_size: int  # ids are below it
    has_bos: bool  # whether prompts begin with a token that the client did not send
    end_tokens: frozenset[int]  # that end a text beside those of the model

    def encode(self, text: str) -> tuple[int, ...]:
        """The tokens of a prompt in the model's training format, with BOS if it has one.

        Raises ValueError with the reason for a text that has no tokens.
        """

    def encode_rendered(self, text: str) -> tuple[int, ...]:
        """Encodes rendered chat text; special tokens are literal and none is added."""

    def complete(self, ids: tuple[int, ...]) -> tuple[int, ...]:
        """The prompt for ids that a client sent: with BOS if it lacks one."""

    def decoder(self, after: tuple[int, ...] = ()) -> TokenDecoder:
        """A decoder of the text behind the prompt `after`; () for a text of its own."""


class ByteTokenizer:
    """One token per byte of UTF-8, after a BOS that no text may contain; negative for no BOS.

    For models without a tokenizer. One with a larger vocabulary, such as random weights in the
    shape of a real model, may answer with ids above 255, which become U+FFFD.
    """

    def __init__(self, vocab_size: int = 256, bos_token: int = 0):
        self.vocab_size, self.bos_token = vocab_size, bos_token
        self.has_bos, self.end_tokens = bos_token >= 0, frozenset()

    def encode(self, text: str) -> tuple[int, ...]:
        tokens = text.encode()
        if 0 <= self.bos_token < 256 and (at := tokens.find(self.bos_token)) >= 0:
            raise ValueError(
                f"has byte {self.bos_token} at byte {at}, which marks the beginning of a text; "
                "remove it, or send token ids"
            )
        return self.complete(tuple(tokens))

    def encode_rendered(self, text: str) -> tuple[int, ...]:
        return tuple(text.encode())

    def complete(self, ids: tuple[int, ...]) -> tuple[int, ...]:
        if not self.has_bos or ids[:1] == (self.bos_token,):
            return ids
        return (self.bos_token, *ids)

    def decoder(self, after: tuple[int, ...] = ()) -> "PieceDecoder":
        return PieceDecoder(_byte)


class PieceDecoder:
    """Decodes tokens that each stand for some bytes: `piece(token)`, b"" for a special one."""

    def __init__(self, piece):
        self._piece = piece
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token: int) -> str:
        return self._decoder.decode(self._piece(token))

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


def _byte(token: int) -> bytes:
    return bytes((token,)) if token < 256 else "\ufffd".encode()
