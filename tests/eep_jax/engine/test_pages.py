"""No page of the KV cache is lost, shared by mistake, or given twice, whatever is done."""

import doctest

import hypothesis.strategies as st
import pytest
from hypothesis import stateful

from eep_jax.engine import pages as pages_module
from eep_jax.engine.pages import PagePool, PrefixKeys

SIZE = 2  # tokens of a page


def test_the_example_of_the_docstring_holds():
    assert doctest.testmod(pages_module).failed == 0


class PoolMachine(stateful.RuleBasedStateMachine):
    """Sequences over two tokens come, grow, are published and go; a model holds what each page has.

    `contents` is the prefix that was last written to each page.
    """

    def __init__(self):
        super().__init__()
        self.pool = PagePool(pages=7, page_tokens=SIZE)
        self.sequences: dict[int, tuple[list[int], list[int], PrefixKeys, str]] = {}
        self.contents: dict[int, tuple] = {}
        self.next = 0

    @stateful.rule(
        tokens=st.lists(st.integers(0, 1), min_size=1, max_size=9), salt=st.sampled_from("ab")
    )
    def begin(self, tokens, salt):
        keys = self.pool.keys(salt)
        pages = self.pool.claim(keys.of(tokens))
        for index, page in enumerate(pages):
            assert self.contents[page] == (salt, *tokens[: (index + 1) * SIZE]), "another prefix"
        missing = -(-len(tokens) // SIZE) - len(pages)
        before = self.pool.free
        more = self.pool.allocate(missing)
        if more is None:
            assert missing > before == self.pool.free
            self.pool.release(pages)
            return
        for index, page in enumerate(more, start=len(pages)):
            assert page not in pages and all(page not in s[1] for s in self.sequences.values())
            self.contents[page] = (salt, *tokens[: (index + 1) * SIZE])
        self.sequences[self.next] = (tokens, pages + more, keys, salt)
        self.next += 1

    @stateful.precondition(lambda self: self.sequences)
    @stateful.rule(data=st.data())
    def publish(self, data):
        tokens, pages, keys, _ = self.sequences[data.draw(st.sampled_from(sorted(self.sequences)))]
        for page, key in zip(pages, keys.of(tokens), strict=False):
            self.pool.publish(page, key)

    @stateful.precondition(lambda self: self.sequences)
    @stateful.rule(data=st.data())
    def end(self, data):
        _, pages, _, _ = self.sequences.pop(data.draw(st.sampled_from(sorted(self.sequences))))
        self.pool.release(pages)

    @stateful.invariant()
    def every_page_is_in_one_state(self):
        self.pool.check()
        held = {page for _, pages, _, _ in self.sequences.values() for page in pages}
        assert self.pool.free == self.pool.pages - len(held)


TestPoolMachine = PoolMachine.TestCase


def test_least_recently_used_prefixes_go_first_and_a_prefix_before_its_beginning():
    pool = PagePool(pages=4, page_tokens=SIZE)
    old, new = pool.keys().of([1, 1, 1, 1]), pool.keys().of([2, 2, 2, 2])
    for keys in (old, new):
        pages = pool.allocate(2)
        for page, key in zip(pages, keys, strict=True):
            pool.publish(page, key)
        pool.release(pages)
    pool.release(pool.claim(old))  # now the newer one was used last but one
    assert pool.allocate(1) and pool.known(new) == 1 and pool.known(old) == 2
    assert pool.allocate(1) and pool.known(new) == 0 and pool.known(old) == 2


def test_salts_and_secrets_keep_prefixes_apart():
    tokens = [5] * SIZE
    pool = PagePool(pages=2, page_tokens=SIZE)
    assert pool.keys("a").of(tokens) != pool.keys("b").of(tokens) != pool.keys().of(tokens)
    assert pool.keys("a").of(tokens) == pool.keys("a").of(tokens)
    assert PagePool(2, SIZE).keys().of(tokens) != pool.keys().of(tokens)


def test_keys_depend_on_every_token_before_them():
    pool = PagePool(pages=2, page_tokens=SIZE)
    same_end = pool.keys().of([1, 2, 7, 7])[1], pool.keys().of([1, 3, 7, 7])[1]
    assert same_end[0] != same_end[1]
    growing = pool.keys()
    assert growing.of([1, 2, 7]) == pool.keys().of([1, 2]) and len(growing.of([1, 2, 7, 7])) == 2


def test_without_a_prefix_cache_nothing_is_found_again():
    pool = PagePool(pages=1, page_tokens=SIZE, prefix_cache=False)
    keys = pool.keys().of([1, 1])
    page = pool.allocate(1)
    pool.publish(page[0], keys[0])
    pool.release(page)
    assert pool.claim(keys) == [] and pool.free == 1


def test_a_page_is_not_released_more_often_than_it_was_taken():
    pool = PagePool(pages=1, page_tokens=SIZE)
    pages = pool.allocate(1)
    pool.release(pages)
    with pytest.raises(AssertionError, match="more often than taken"):
        pool.release(pages)
