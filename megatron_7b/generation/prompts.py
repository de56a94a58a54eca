"""Prompts: from text to the tokens that a model is given."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_7b.errors import ConfigError
from megatron_7b.generation.settings import read_json_object
from megatron_7b.tokenizer import Tokenizer
from megatron_7b.tokenizer.hugging_face import HuggingFaceTokenizer


@dataclass(frozen=True)
class Prompt:
    """A text to be continued.

    Attributes:
        text: The text.
        ids: Its tokens.
        is_chat: It is a conversation, spelled out for the model: readers want the reply alone.
    """

    text: str
    ids: tuple[int, ...]
    is_chat: bool = False


def encode_prompt(text: str, tokenizer: Tokenizer, *, add_bos: bool | None = None) -> Prompt:
    """Return the tokens of a prompt; an empty one begins a document, as one does in training: after another's end.

    Args:
        text: The text.
        tokenizer: What encodes.
        add_bos: Whether the text begins with the tokenizer's bos token; None does what transformers does.

    Raises:
        ConfigError: The tokenizer has no bos token, or the text is empty and no token begins a document.
    """
    if add_bos and tokenizer.bos_id is None:
        raise ConfigError("--add-bos is set, but the tokenizer has no bos token")
    leading = leading_ids(tokenizer) if add_bos is None else ()
    if add_bos and tokenizer.bos_id is not None:
        leading = (tokenizer.bos_id,)
    ids = (*leading, *tokenizer.encode(text))
    if not ids:
        beginning = tokenizer.eod_id if tokenizer.eod_id is not None else tokenizer.bos_id
        if beginning is None:
            raise ConfigError("the prompt is empty, and the tokenizer has no token that begins a document")
        ids = (beginning,)
    return Prompt(text, ids)


def leading_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Return the tokens that transformers puts before a text: often a bos token, or none."""
    if isinstance(tokenizer, HuggingFaceTokenizer):
        plain, whole = (tokenizer.backend.encode("a", add_special_tokens=special).ids for special in (False, True))
        starts = (start for start in range(len(whole)) if whole[start : start + len(plain)] == plain)
        return tuple(whole[: next(starts, 0)])
    wants_bos = tokenizer.kind == "sentencepiece" and read_tokenizer_settings(tokenizer).get("add_bos_token") is True
    return (tokenizer.bos_id,) if wants_bos and tokenizer.bos_id is not None else ()


def read_tokenizer_settings(tokenizer: Tokenizer) -> Mapping[str, Any]:
    """Return the content of the tokenizer_config.json beside a tokenizer's files, over that of special_tokens_map.json.

    Raises:
        ConfigError: One of them is damaged.
    """
    folder = tokenizer_folder(tokenizer)
    settings: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        file = folder / name if folder is not None else None
        if file is not None and file.is_file():
            settings |= {key: value for key, value in read_json_object(file).items() if value is not None}
    return settings


def tokenizer_folder(tokenizer: Tokenizer) -> Path | None:
    """Return where a tokenizer's files lie; None for the built-in byte tokenizer."""
    path = tokenizer.path
    return path if path is None or path.is_dir() else path.parent
