"""Real tokenizer files: text that is streamed is the text that is decoded at once."""

import dataclasses
import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from eep_jax.config import RunConfig
from eep_jax.runtime.http.checks import RequestError
from eep_jax.runtime.http.completion import CompletionLimits, parse_request
from eep_jax.runtime.text.detokenizer import TextAssembler
from eep_jax.runtime.text.hf_tokenizer import HFTokenizer
from eep_jax.runtime.text.open import open_tokenizer, tokenizer_directory
from eep_jax.runtime.text.tokenizer import ByteTokenizer
from tests.support import hf_tokenizers
from tests.support.models import a_model, a_run

KINDS = ("byte_level", "byte_fallback", "metaspace")


@pytest.fixture(scope="module", params=KINDS)
def pair(request, tmp_path_factory):
    """(ours, the library's own) of one kind."""
    inner = getattr(hf_tokenizers, request.param)()
    directory = hf_tokenizers.write_tokenizer(tmp_path_factory.mktemp(request.param), inner)
    return HFTokenizer(directory), inner


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    inner = hf_tokenizers.byte_level()
    return HFTokenizer(hf_tokenizers.write_tokenizer(tmp_path_factory.mktemp("t"), inner)), inner


def streamed(tokenizer, tokens, after=(), stop=()) -> list[str]:
    assembler = TextAssembler(stop, tokenizer.decoder(after))
    return [*(assembler.feed((token,)) for token in tokens), assembler.finish()]


ANY_TEXT = st.text(alphabet="the and a\n éß人工😀👩‍🚀\ufffd", max_size=30)


class TestDecoding:
    @settings(max_examples=60)
    @given(text=ANY_TEXT)
    @example(text="naïve café 😀 東京")
    @example(text="  two spaces  ")
    def test_the_pieces_of_a_stream_join_to_the_text(self, pair, text):
        ours, inner = pair
        tokens = inner.encode(text, add_special_tokens=False).ids
        pieces = streamed(ours, tokens)
        assert "".join(pieces) == inner.decode(tokens)
        whole = inner.decode(tokens)
        if "\ufffd" not in whole:
            assert not any("\ufffd" in piece for piece in pieces)

    @settings(max_examples=60)
    @given(before=ANY_TEXT, text=ANY_TEXT)
    def test_a_completion_goes_on_where_its_prompt_ends(self, pair, before, text):
        ours, inner = pair
        prompt = ours.encode("the" + before)
        tokens = tuple(inner.encode(text, add_special_tokens=False).ids)
        joined = inner.decode([*prompt]) + "".join(streamed(ours, tokens, prompt))
        assert joined == inner.decode([*prompt, *tokens])

    @given(tokens=st.lists(st.integers(0, 403), max_size=30))
    def test_any_tokens_of_bytes_decode_as_the_library_does(self, byte_level, tokens):
        ours, inner = byte_level
        assert "".join(streamed(ours, tokens)) == inner.decode(tokens)

    @given(tokens=st.lists(st.integers(0, 300), max_size=30), cuts=st.lists(st.integers(0, 30)))
    def test_how_tokens_are_grouped_changes_nothing(self, pair, tokens, cuts):
        """A rank that dies is followed by one that gives several tokens at once."""
        ours, _ = pair
        ends = sorted({min(cut, len(tokens)) for cut in cuts} | {len(tokens)})
        assembler, text = TextAssembler((), ours.decoder()), ""
        for begin, end in zip([0, *ends], ends, strict=False):
            text += assembler.feed(tokens[begin:end])
        assert text + assembler.finish() == "".join(streamed(ours, tokens))

    def test_half_a_character_is_held_back_and_never_lost(self, pair):
        ours, inner = pair
        tokens = inner.encode("a😀b", add_special_tokens=False).ids
        pieces = streamed(ours, tokens)
        assert "".join(pieces).endswith("a😀b") and "" in pieces

    def test_special_tokens_are_no_text_and_added_words_are(self, byte_level):
        ours, inner = byte_level
        words = ("</s>", "<think>", "<|im_end|>")
        assert "".join(streamed(ours, [inner.token_to_id(w) for w in words])) == "<think>"

    def test_ids_that_no_text_has_are_nothing(self, pair):
        assert "".join(streamed(pair[0], [100_000, 100_001])) == ""


class TestPrompts:
    def test_a_bos_is_added_where_the_model_has_one(self, pair):
        ours, inner = pair
        assert list(ours.encode("the")) == inner.encode("the").ids
        assert ours.has_bos == (inner.encode("the").ids[0] == inner.token_to_id("<s>"))

    @pytest.mark.parametrize(("add", "bos"), [(True, True), (False, False)])
    def test_add_bos_token_overrules_the_file(self, tmp_path, add, bos):
        inner = hf_tokenizers.byte_fallback()
        config = {"add_bos_token": add, "bos_token": {"content": "<s>"}}
        ours = HFTokenizer(hf_tokenizers.write_tokenizer(tmp_path, inner, **config))
        tokens = ours.encode("the")
        assert (tokens[0] == inner.token_to_id("<s>")) == bos
        assert tokens[-1] != inner.token_to_id("<s>") and ours.has_bos == bos

    def test_a_bos_that_is_no_token_is_named(self, tmp_path):
        config = {"add_bos_token": True, "bos_token": "<BOS>"}
        with pytest.raises(ValueError, match="<BOS>"):
            HFTokenizer(hf_tokenizers.write_tokenizer(tmp_path, **config))

    def test_template_text_spells_its_special_tokens(self, byte_level):
        ours, inner = byte_level
        tokens = ours.encode_rendered("<|im_start|>the")
        assert tokens[0] == inner.token_to_id("<|im_start|>")

    def test_ids_are_taken_as_they_are(self, byte_level):
        assert byte_level[0].complete((5, 6)) == (5, 6)
        assert ByteTokenizer(256, 0).complete((5, 6)) == (0, 5, 6)
        assert ByteTokenizer(256, -1).complete((5, 6)) == (5, 6)
        assert ByteTokenizer(256, -1).encode("\0a") == (0, 97)

    def test_settings_of_training_cut_nothing(self, tmp_path):
        inner = hf_tokenizers.byte_level()
        inner.enable_truncation(3)
        inner.enable_padding(length=50)
        ours = HFTokenizer(hf_tokenizers.write_tokenizer(tmp_path, inner))
        assert 3 < len(ours.encode("the heaven and the earth was without form")) < 50

    def test_a_request_says_how_long_its_prompt_may_be(self, byte_level):
        limits = CompletionLimits(model="m", context_tokens=8, tokenizer=byte_level[0])
        with pytest.raises(RequestError, match="the context of 8 must also hold") as caught:
            parse_request({"model": "m", "prompt": "the " * 20}, limits)
        assert caught.value.code == "context_length_exceeded"
        assert "BOS" not in str(caught.value)
        with pytest.raises(RequestError, match="no BOS"):
            parse_request({"model": "m", "prompt": ""}, limits)
        with pytest.raises(RequestError, match="ids run from 0 to"):
            parse_request({"model": "m", "prompt": [100_000]}, limits)


class TestOpening:
    def config(self, **fields) -> RunConfig:
        return dataclasses.replace(a_run(), **fields)

    def test_without_a_file_tokens_are_bytes(self, tmp_path):
        config = self.config(checkpoint=str(tmp_path))
        assert isinstance(open_tokenizer(config), ByteTokenizer)
        text = "".join(streamed(ByteTokenizer(70_000), [104, 105, 66_000]))
        assert text == "hi\ufffd"

    def test_the_checkpoint_brings_its_own(self, tmp_path):
        hf_tokenizers.write_tokenizer(tmp_path)
        config = self.config(checkpoint=str(tmp_path))
        assert tokenizer_directory(config) == tmp_path

    def test_a_directory_without_one_is_named(self, tmp_path):
        with pytest.raises(ValueError, match=r"has no tokenizer\.json"):
            open_tokenizer(self.config(tokenizer=str(tmp_path)))

    @pytest.mark.parametrize("file", ["tokenizer.model", "qwen.tiktoken", "vocab.json"])
    def test_a_tokenizer_of_another_form_is_not_replaced_by_bytes(self, tmp_path, file):
        (tmp_path / file).write_bytes(b"")
        for fields in ({"checkpoint": str(tmp_path)}, {"tokenizer": str(tmp_path)}):
            with pytest.raises(ValueError, match=rf"no tokenizer\.json, but {file}: convert it"):
                open_tokenizer(self.config(**fields))
        chosen = self.config(checkpoint=str(tmp_path), tokenizer="bytes")
        assert isinstance(open_tokenizer(chosen), ByteTokenizer)

    def test_a_large_vocabulary_is_not_one_of_bytes(self, tmp_path):
        large = self.config(checkpoint=str(tmp_path), model=a_model(vocab_size=32_000))
        with pytest.raises(ValueError, match="one token per byte"):
            open_tokenizer(large)
        open_tokenizer(dataclasses.replace(large, checkpoint=""))

    def test_tokens_of_other_files_are_tokens(self, tmp_path):
        first = hf_tokenizers.byte_level().get_vocab_size(with_added_tokens=True)
        listed = {first: {"content": "<|tool|>", "special": True}, first + 1: {"content": "<say>"}}
        decoder = {str(token): fields for token, fields in listed.items()}
        hf_tokenizers.write_tokenizer(tmp_path, added_tokens_decoder=decoder, eos_token="<|tool|>")
        (tmp_path / "added_tokens.json").write_text(json.dumps({"<more>": first + 2}))
        tokenizer = HFTokenizer(tmp_path)
        assert tokenizer.encode_rendered("<|tool|><say><more>") == (first, first + 1, first + 2)
        assert tokenizer.vocab_size == first + 3
        assert "".join(streamed(tokenizer, [first, first + 1, first + 2])) == "<say><more>"
        assert tokenizer.end_tokens == {first}

    def test_a_token_that_would_get_another_id_is_named(self, tmp_path):
        hf_tokenizers.write_tokenizer(tmp_path, added_tokens_decoder={"9999": {"content": "<x>"}})
        with pytest.raises(ValueError, match="'<x>' has the id 9999"):
            HFTokenizer(tmp_path)

    @pytest.mark.parametrize("found", [[1], {"a": {"content": "x"}}, {"7": {}}, {"7": 3}])
    def test_damaged_lists_of_tokens_are_named(self, tmp_path, found):
        hf_tokenizers.write_tokenizer(tmp_path, added_tokens_decoder=found)
        with pytest.raises(ValueError, match=r"tokenizer_config\.json: its added tokens"):
            HFTokenizer(tmp_path)

    def test_the_tokenizers_own_end_ends_an_answer_unless_it_is_ignored(self, tmp_path):
        inner = hf_tokenizers.byte_level()
        hf_tokenizers.write_tokenizer(tmp_path, inner, eos_token=hf_tokenizers.EOS)
        end = inner.token_to_id(hf_tokenizers.EOS)
        config = self.config(tokenizer=str(tmp_path), model=a_model(vocab_size=500))
        limits = CompletionLimits(model="m", context_tokens=64, tokenizer=open_tokenizer(config))
        sent = {"model": "m", "prompt": "Hi"}
        assert parse_request(sent, limits).shaping.stop_token_ids == (end,)
        asked = parse_request(sent | {"stop_token_ids": [1, end]}, limits)
        assert asked.shaping.stop_token_ids == (1, end)
        ignoring = parse_request(sent | {"ignore_eos": True, "stop_token_ids": [1]}, limits)
        assert ignoring.shaping.stop_token_ids == (1,)
        known = dataclasses.replace(config, model=a_model(vocab_size=500, eos_token=end))
        assert open_tokenizer(known).end_tokens == frozenset()

    def test_a_tokenizer_of_another_model_is_refused(self, tmp_path):
        config = self.config(tokenizer=str(hf_tokenizers.write_tokenizer(tmp_path)))
        assert config.model.vocab_size < 400
        with pytest.raises(ValueError, match="another model"):
            open_tokenizer(config)

    def test_a_decoder_of_another_kind_is_named(self, tmp_path):
        hf_tokenizers.write_tokenizer(tmp_path, hf_tokenizers.word_piece())
        with pytest.raises(ValueError, match=r"tokenizer\.json: its decoder .*WordPiece.*; supp"):
            open_tokenizer(self.config(tokenizer=str(tmp_path)))

    @pytest.mark.parametrize("damage", ["", "{", json.dumps({"model": 3})])
    def test_a_damaged_file_is_named(self, tmp_path, damage):
        hf_tokenizers.write_tokenizer(tmp_path)
        (tmp_path / "tokenizer.json").write_text(damage)
        with pytest.raises(ValueError, match=r"tokenizer\.json cannot be read as a tokenizer"):
            open_tokenizer(self.config(tokenizer=str(tmp_path)))
