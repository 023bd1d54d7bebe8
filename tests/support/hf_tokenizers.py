"""Small tokenizers of the kinds that real models have, trained here in a moment."""

import json
import pathlib

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

TEXT = [
    "In the beginning God created the heaven and the earth. And the earth was without form.",
    "Größe, naïve café, 人工知能 and 東京, emoji 😀😃 👩‍🚀, tabs\tand\nnew lines  and spaces.",
] * 20
BOS, EOS, START, END = "<s>", "</s>", "<|im_start|>", "<|im_end|>"
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def byte_level(vocab_size: int = 400) -> tokenizers.Tokenizer:
    """As Qwen, DeepSeek, OLMoE and gpt-oss have: BPE over bytes, no BOS."""
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(TEXT, trainer)
    inner.add_special_tokens([EOS, START, END])
    inner.add_tokens(["<think>"])
    return inner


def byte_fallback() -> tokenizers.Tokenizer:
    """As Mixtral has: SentencePiece's BPE, bytes where a character is unknown, a BOS."""
    pieces = [BOS, EOS, "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    letters = sorted(set("".join(TEXT[:1]).replace(" ", "▁")) | {"é"})
    words = ["th", "the", "▁the", "▁a", "an", "▁an", "▁and"]
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("▁", "a"), ("a", "n"), ("▁", "an")]
    vocabulary = {piece: i for i, piece in enumerate([*pieces, *letters, *words, "d"][: 10**6])}
    vocabulary = {piece: i for i, piece in enumerate(vocabulary)}
    model = models.BPE(
        vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True
    )
    inner = tokenizers.Tokenizer(model)
    inner.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    inner.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    inner.add_special_tokens([BOS, EOS, "<unk>"])
    inner.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, inner.token_to_id(BOS))]
    )
    return inner


def metaspace() -> tokenizers.Tokenizer:
    """The same with the decoder that older conversions of SentencePiece models have."""
    inner = byte_fallback()
    inner.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return inner


def word_piece() -> tokenizers.Tokenizer:
    """A decoder that is not supported."""
    inner = byte_fallback()
    inner.decoder = decoders.WordPiece()
    return inner


def write_tokenizer(
    directory: pathlib.Path, inner: tokenizers.Tokenizer | None = None, **config
) -> pathlib.Path:
    """tokenizer.json and, with these fields, tokenizer_config.json."""
    directory.mkdir(parents=True, exist_ok=True)
    (inner or byte_level()).save(str(directory / "tokenizer.json"))
    if config:
        (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory
