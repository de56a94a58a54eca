"""What the files beside a tokenizer say of its use: names of special tokens, chat templates."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_7b.tokenizer.base import Tokenizer
from megatron_7b.tokenizer.definition import CONFIG_FILE, read_object_if_there
from megatron_7b.tokenizer.settled import SPECIAL_TOKENS_FILE


def read_tokenizer_settings(tokenizer: Tokenizer) -> Mapping[str, Any]:
    """Return the content of tokenizer_config.json over that of special_tokens_map.json, without empty values.

    Raises:
        DataFormatError: One of them is damaged.
    """
    folder = tokenizer_folder(tokenizer)
    if folder is None:
        return {}
    settings: dict[str, Any] = {}
    for name in (SPECIAL_TOKENS_FILE, CONFIG_FILE):
        content = read_object_if_there(folder / name)
        settings |= {key: value for key, value in content.items() if value is not None}
    return settings


def tokenizer_folder(tokenizer: Tokenizer) -> Path | None:
    """Return the folder of a tokenizer's files; None for the built-in byte tokenizer."""
    path = tokenizer.path
    return path if path is None or path.is_dir() else path.parent
