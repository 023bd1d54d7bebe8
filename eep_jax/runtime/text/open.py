"""Choice of a run's tokenizer: that of a directory with tokenizer.json, or plain bytes."""

import pathlib

from eep_jax.config import RunConfig
from eep_jax.runtime.text.hf_tokenizer import HFTokenizer
from eep_jax.runtime.text.tokenizer import TOKENIZER_FILE, ByteTokenizer, Tokenizer


def tokenizer_directory(config: RunConfig) -> pathlib.Path | None:
    """The directory of the run's tokenizer.json and chat template; None for a model of bytes.

    Raises ValueError where the configured directory has no tokenizer.json.
    """
    if config.tokenizer:
        directory = pathlib.Path(config.tokenizer)
        if not (directory / TOKENIZER_FILE).is_file():
            raise ValueError(
                f"tokenizer={config.tokenizer!r} has no {TOKENIZER_FILE}; name the directory of a "
                "Hugging Face model, or leave it out to take the checkpoint's"
            )
        return directory
    if config.checkpoint and (pathlib.Path(config.checkpoint) / TOKENIZER_FILE).is_file():
        return pathlib.Path(config.checkpoint)
    return None


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
    return tokenizer
