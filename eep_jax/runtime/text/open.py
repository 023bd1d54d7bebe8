"""Choice of a run's tokenizer: that of a directory with tokenizer.json, or plain bytes.

No text is read as bytes in silence: only a vocabulary that may be one of bytes, random weights, or
`tokenizer="bytes"` make them the tokens.
"""

import pathlib

from eep_jax.config import RunConfig
from eep_jax.runtime.text.hf_tokenizer import HFTokenizer
from eep_jax.runtime.text.tokenizer import TOKENIZER_FILE, ByteTokenizer, Tokenizer

BYTES = "bytes"  # as the name of a tokenizer
BYTE_IDS_MAX = 512  # of a vocabulary of bytes, special tokens and padding
# Files of tokenizers that transformers converts.
OTHER_FILES = ("tokenizer.model", "*.tiktoken", "tiktoken.model", "spiece.model", "vocab.json")


def tokenizer_directory(config: RunConfig) -> pathlib.Path | None:
    """The directory of the run's tokenizer.json and chat template; None for a model of bytes.

    Raises ValueError where a directory that should have a tokenizer.json has none.
    """
    if config.tokenizer == BYTES:
        return None
    if config.tokenizer:
        directory = pathlib.Path(config.tokenizer)
        if not (directory / TOKENIZER_FILE).is_file():
            raise ValueError(
                f"tokenizer={config.tokenizer!r} has no {TOKENIZER_FILE}{_conversion(directory)}; "
                "name the directory of a Hugging Face model, or leave it out to take the "
                "checkpoint's"
            )
        return directory
    if not config.checkpoint:
        return None
    directory = pathlib.Path(config.checkpoint)
    if (directory / TOKENIZER_FILE).is_file():
        return directory
    way_out = _conversion(directory)
    if way_out or config.model.vocab_size > BYTE_IDS_MAX:
        raise ValueError(
            f"{directory} has no {TOKENIZER_FILE}{way_out}; or set tokenizer to the directory of "
            f"one, or to {BYTES!r} for one token per byte"
        )
    return None


def _conversion(directory: pathlib.Path) -> str:
    """The other tokenizer that a directory has, and how to convert it; "" if it has none."""
    found = sorted(path.name for pattern in OTHER_FILES for path in directory.glob(pattern))
    if not found:
        return ""
    command = "AutoTokenizer.from_pretrained(DIRECTORY).save_pretrained(DIRECTORY)"
    return f", but {found[0]}: convert it with transformers, `{command}`"


def open_tokenizer(config: RunConfig) -> Tokenizer:
    """Opens the run's tokenizer. Raises ValueError, naming the file, if it cannot be used."""
    directory = tokenizer_directory(config)
    if directory is None:
        return ByteTokenizer(config.model.vocab_size, config.model.bos_token)
    tokenizer = HFTokenizer(directory)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ValueError(
            f"{directory / TOKENIZER_FILE} has ids up to {tokenizer.vocab_size - 1}, the model "
            f"only {config.model.vocab_size}; it is the tokenizer of another model"
        )
    # The model's rows beyond the tokenizer's ids are padding, but a client may send them as ids.
    tokenizer.vocab_size = config.model.vocab_size
    # Ranks know the model's own.
    tokenizer.end_tokens -= config.model.end_tokens
    return tokenizer
