"""Tokens become text that is never taken back, and ends in front of the first stop string."""

from hypothesis import example, given
from hypothesis import strategies as st

from eep_jax.runtime.text.detokenizer import TextAssembler
from eep_jax.runtime.text.tokenizer import ByteTokenizer

BYTES = ByteTokenizer()


def cut(text: str, stop: tuple[str, ...]) -> str:
    """The text up to the stop string that is complete first: the plain way to say it."""
    for end in range(1, len(text) + 1):
        if words := [word for word in stop if text[:end].endswith(word)]:
            return text[: end - max(map(len, words))]
    return text


def assemble(groups: list[bytes], stop: tuple[str, ...]) -> tuple[list[str], TextAssembler]:
    assembler = TextAssembler(stop, BYTES.decoder())
    deltas = [assembler.feed(group) for group in groups]
    return [*deltas, assembler.finish()], assembler


FEW_LETTERS = st.text(alphabet="ab\u00e9\ufffd", max_size=12)
ANY_BYTES = st.lists(
    st.one_of(st.sampled_from(b"ab\xc3\xa9\xf0\x9f\x98\x80\xe2\xff"), st.integers(0, 255)),
    max_size=30,
).map(bytes)
STOPS = st.lists(FEW_LETTERS.filter(bool), max_size=4).map(tuple)


class TestTextAssembler:
    @given(st.one_of(FEW_LETTERS.map(str.encode), ANY_BYTES), STOPS, st.data())
    def test_deltas_join_to_the_text_before_the_first_stop_string(self, data, stop, draw):
        ends = sorted(draw.draw(st.lists(st.integers(0, len(data)), max_size=6)))
        groups = [data[a:b] for a, b in zip([0, *ends], [*ends, len(data)], strict=True)]
        deltas, grouped = assemble(groups, stop)
        text = data.decode(errors="replace")
        assert "".join(deltas) == cut(text, stop)
        assert grouped.stopped == (cut(text, stop) != text or any(word in text for word in stop))
        _, single = assemble([bytes((byte,)) for byte in data], stop)
        assert grouped.num_tokens == single.num_tokens

    @given(FEW_LETTERS, STOPS)
    @example("aab", ("ab",))
    @example("abab\u00e9", ("ababa", "bab"))
    def test_every_prefix_that_was_sent_stays_true(self, text, stop):
        assembler, sent = TextAssembler(stop, BYTES.decoder()), ""
        for byte in text.encode():
            sent += assembler.feed((byte,))
            assert cut(text, stop).startswith(sent)

    def test_a_character_is_sent_whole(self):
        assembler = TextAssembler((), BYTES.decoder())
        deltas = [assembler.feed((byte,)) for byte in "a€".encode()]
        assert deltas == ["a", "", "", "€"]

    def test_what_may_begin_a_stop_string_is_held_back_until_it_does_not(self):
        assembler = TextAssembler(("END",), BYTES.decoder())
        assert assembler.feed(b"the E") == "the "
        assert assembler.feed(b"N") == ""
        assert assembler.feed(b"!") == "EN!"

    def test_tokens_are_counted_up_to_the_end_of_the_stop_string(self):
        assembler = TextAssembler(("END",), BYTES.decoder())
        assert assembler.feed(b"onENDtwo") == "on"
        assert (assembler.stopped, assembler.num_tokens) == (True, 5)
        assert (assembler.feed(b"more"), assembler.finish(), assembler.num_tokens) == ("", "", 5)

    def test_of_stop_strings_that_end_together_the_longest_counts(self):
        assert assemble([b"xabc"], ("c", "abc", "bc"))[0] == ["x", ""]

    def test_an_unfinished_character_becomes_a_replacement_at_the_end(self):
        assert assemble([b"a\xe2\x82"], ())[0] == ["a", "\ufffd"]
