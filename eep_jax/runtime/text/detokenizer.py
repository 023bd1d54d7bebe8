"""Tokens that become text which can be sent at once and never taken back."""

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
        self.stopped = False  # a stop string was met; the text ends in front of it
        self.num_tokens = 0  # taken in, up to the token that completed the stop string
        self._decoder = decoder
        self._held = ""  # never longer than the longest stop string
        self._searches = tuple(_Search(word) for word in stop)

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
        """Returns what was held back: no more tokens come."""
        if self.stopped:
            return ""
        text = self._advance(self._decoder.finish())
        held, self._held = self._held, ""
        return text + held

    def _advance(self, text: str) -> str:
        ready = ""
        for char in text:
            self._held += char
            matched = [search.advance(char) for search in self._searches]
            found = [search.size for search in self._searches if search.found]
            self.stopped = bool(found)
            certain = len(self._held) - max(found or matched, default=0)
            ready += self._held[:certain]
            self._held = "" if found else self._held[certain:]
            if found:
                break
        return ready


class _Search:
    """Looks for one word, character by character (Knuth, Morris and Pratt, 1977)."""

    def __init__(self, word: str):
        self.size, self._word, self._matched = len(word), word, 0
        self._shorter = [0]  # of a prefix: length of its longest proper suffix that is a prefix
        for end in range(1, len(word)):
            size = self._shorter[-1]
            while size and word[size] != word[end]:
                size = self._shorter[size - 1]
            self._shorter.append(size + (word[size] == word[end]))

    @property
    def found(self) -> bool:
        return self._matched == self.size

    def advance(self, char: str) -> int:
        """Returns how many characters of the word the text now ends with. Ends once it is found."""
        size = self._matched
        while size and self._word[size] != char:
            size = self._shorter[size - 1]
        self._matched = size + (self._word[size] == char)
        return self._matched
