"""Assembly of an answer's text, increment by increment, cut at its first stop string."""

from collections.abc import Iterable

from eep_jax.runtime.text.tokenizer import TokenDecoder


class TextAssembler:
    """Text of one answer, cut at its first stop string.

    It holds back an unfinished UTF-8 character, and text that may be the beginning of a stop
    string: with the stop "END" and bytes for tokens, `feed(b"the E")` gives "the ", then
    `feed(b"N")` gives "", and `feed(b"!")` gives "EN!". Invalid bytes become U+FFFD. The stop
    string that counts is the one that is complete first, and of those that end together the
    longest; how tokens are grouped into calls changes nothing.
    """

    def __init__(self, stop: tuple[str, ...], decoder: TokenDecoder):
        self.stopped = False  # a stop string was found; the text ends in front of it
        self.num_tokens = 0  # read, up to the token that completed the stop string
        self._decoder = decoder
        self._held = ""  # shorter than the longest stop string
        self._stop = stop

    def feed(self, tokens: Iterable[int]) -> str:
        """Returns the text that became certain; "" once stopped."""
        parts = []
        for token in tokens:
            if self.stopped:
                break
            parts.append(self._advance(self._decoder.feed(token)))
            self.num_tokens += 1
        return "".join(parts)

    def finish(self) -> str:
        """Returns the held text after the last token."""
        if self.stopped:
            return ""
        text = self._advance(self._decoder.finish())
        held, self._held = self._held, ""
        return text + held

    def _advance(self, text: str) -> str:
        """Returns what became certain of the held text and `text`, and holds the rest."""
        self._held += text
        # (end, -length) of each word's first occurrence: the first end counts, then the length.
        found = [(at + len(w), -len(w)) for w in self._stop if (at := self._held.find(w)) >= 0]
        self.stopped = bool(found)
        if found:
            certain = sum(min(found))
            ready, self._held = self._held[:certain], ""
            return ready
        certain = len(self._held) - max((self._begun(word) for word in self._stop), default=0)
        ready, self._held = self._held[:certain], self._held[certain:]
        return ready

    def _begun(self, word: str) -> int:
        """Length of the longest beginning of `word` that the held text ends with."""
        sizes = range(min(len(word) - 1, len(self._held)), 0, -1)
        return next((size for size in sizes if self._held.endswith(word[:size])), 0)
