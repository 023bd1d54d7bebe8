"""Page pool of a rank's KV cache: who holds which page, and which pages hold a known prefix.

A page holds the keys and values of `page_tokens` consecutive positions of a sequence, of all
layers. A sequence holds its pages in order of position and only appends. A page that is full and
committed may be shared: its key is a chained hash of all tokens up to its end, so equal keys mean
equal prefixes. Pages are counted by reference; one without references that has a key stays as a
cached prefix until its space is needed, least recently used first.
"""

import collections
import hashlib
import secrets
from collections.abc import Iterable, Sequence

Key = bytes


class PrefixKeys:
    """Keys of a token sequence's full pages, extended as the sequence grows.

    Args:
        page_tokens: positions of one page.
        secret: key of the hash, the same for all sequences of a pool. Clients must not know it, or
            they could make two prefixes with one key.
        salt: prefixes are shared only between sequences with equal salts.
    """

    def __init__(self, page_tokens: int, secret: bytes, salt: str = ""):
        self.page_tokens, self._secret = page_tokens, secret
        self._keys: list[Key] = []
        self._seed = self._hash(salt.encode())

    def of(self, tokens: Sequence[int]) -> list[Key]:
        """The keys of the full pages of `tokens`, which extend those of earlier calls."""
        size = self.page_tokens
        while (len(self._keys) + 1) * size <= len(tokens):
            start = len(self._keys) * size
            previous = self._keys[-1] if self._keys else self._seed
            page = b"".join(t.to_bytes(4, "little") for t in tokens[start : start + size])
            self._keys.append(self._hash(previous + page))
        return self._keys[: len(tokens) // size]

    def _hash(self, data: bytes) -> Key:
        return hashlib.blake2b(data, digest_size=16, key=self._secret).digest()


class PagePool:
    """Free, held and cached pages. Not thread-safe: call from the engine thread only.

    >>> pool = PagePool(pages=3, page_tokens=4)
    >>> first = pool.allocate(2)
    >>> pool.publish(first[0], b"prefix"), pool.release(first), pool.free
    (None, None, 3)
    >>> pool.claim([b"prefix", b"other"]) == first[:1], pool.free
    (True, 2)
    """

    def __init__(self, pages: int, page_tokens: int, prefix_cache: bool = True):
        """
        Args:
            pages: how many there are, numbered from 0.
            page_tokens: positions of one page.
            prefix_cache: whether pages without references are kept for later sequences.
        """
        self.pages, self.page_tokens = pages, page_tokens
        self.secret = secrets.token_bytes(16)
        self._prefix_cache = prefix_cache
        self._unused = collections.deque(range(pages))
        self._references = [0] * pages
        self._key_of: dict[int, Key] = {}
        self._page_of: dict[Key, int] = {}
        self._idle: collections.OrderedDict[int, None] = collections.OrderedDict()
        self.evicted = 0

    @property
    def free(self) -> int:
        """Pages that can be allocated: unused ones, and cached ones without references."""
        return len(self._unused) + len(self._idle)

    @property
    def cached(self) -> int:
        """Pages that hold a known prefix, referenced or not."""
        return len(self._key_of)

    @property
    def held(self) -> int:
        """Pages with references."""
        return self.pages - self.free

    def keys(self, salt: str = "") -> PrefixKeys:
        """An empty chain of keys for a new sequence."""
        return PrefixKeys(self.page_tokens, self.secret, salt)

    def known(self, keys: Iterable[Key]) -> int:
        """How many of the first `keys` are cached. Changes nothing."""
        count = 0
        for key in keys:
            if key not in self._page_of:
                break
            count += 1
        return count

    def cost(self, keys: Sequence[Key], count: int) -> int:
        """How many free pages it takes to hold `count`, the first of which are known by `keys`."""
        return count - sum(self._references[self._page_of[key]] > 0 for key in keys)

    def claim(self, keys: Sequence[Key]) -> list[int]:
        """Takes references to the pages of the longest cached prefix of `keys`."""
        pages = [self._page_of[key] for key in keys[: self.known(keys)]]
        for page in pages:
            self._references[page] += 1
            self._idle.pop(page, None)
        return pages

    def allocate(self, count: int) -> list[int] | None:
        """Takes `count` pages with undefined contents; None, and nothing changes, if too few."""
        if count > self.free:
            return None
        pages = []
        for _ in range(count):
            if self._unused:
                page = self._unused.popleft()
            else:
                page, _ = self._idle.popitem(last=False)
                self._forget(page)
                self.evicted += 1
            self._references[page] = 1
            pages.append(page)
        return pages

    def publish(self, page: int, key: Key) -> None:
        """Makes a full, committed page that the caller holds shareable under `key`.

        A page that already has a key keeps it. If another page has this key, nothing changes: both
        hold the same, and the other one is found.
        """
        assert self._references[page] > 0, f"page {page} is published by nobody who holds it"
        if self._prefix_cache and page not in self._key_of and key not in self._page_of:
            self._key_of[page], self._page_of[key] = key, page

    def release(self, pages: Iterable[int]) -> None:
        """Drops one reference to each page, the last ones of a sequence first in line to go."""
        for page in reversed(list(pages)):
            assert self._references[page] > 0, f"page {page} is released more often than taken"
            self._references[page] -= 1
            if self._references[page]:
                continue
            if page in self._key_of:
                self._idle[page] = None
            else:
                self._unused.append(page)

    def check(self) -> None:
        """Raises AssertionError unless every page is in exactly one state."""
        unused, idle = set(self._unused), set(self._idle)
        held = {page for page, count in enumerate(self._references) if count}
        assert len(unused) == len(self._unused), "a page is unused twice"
        assert not unused & idle and not (unused | idle) & held, "a page is in two states"
        assert unused | idle | held == set(range(self.pages)), "a page is lost"
        assert idle <= set(self._key_of) and not unused & set(self._key_of)
        assert {key: page for page, key in self._key_of.items()} == self._page_of

    def _forget(self, page: int) -> None:
        del self._page_of[self._key_of.pop(page)]
