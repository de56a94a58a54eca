"""What the files beside a tokenizer say of its use: names of special tokens, chat templates."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_7b.tokenizer.base import Tokenizer
from megatron_7b.tokenizer.settled import read_declarations


def read_tokenizer_settings(tokenizer: Tokenizer) -> Mapping[str, Any]:
    """Return what the files beside a vocabulary say, with transformers' precedence, without empty values.

    Raises:
        DataFormatError: One of them is not a JSON object.
    """
    folder = tokenizer_folder(tokenizer)
    settings = {} if folder is None else read_declarations(folder).settings
    return {key: value for key, value in settings.items() if value is not None}


def tokenizer_folder(tokenizer: Tokenizer) -> Path | None:
    """Return the folder of a tokenizer's files; None for the built-in byte tokenizer."""
    path = tokenizer.path
    return path if path is None or path.is_dir() else path.parent
