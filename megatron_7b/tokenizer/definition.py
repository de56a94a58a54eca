"""What makes a Hugging Face tokenizer, wherever it was read or built, and the reading of its JSON files."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from megatron_7b.errors import DataFormatError
from megatron_7b.files import LFS_HINT, is_lfs_pointer

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja")


@dataclass(frozen=True, kw_only=True)
class Definition:
    """A tokenizer.json, the roles of its tokens, and what is saved with it."""

    path: Path
    """The folder or file that it was read from."""
    content: Mapping[str, Any]
    """As in a tokenizer.json, without padding and truncation."""
    eod_id: int | None
    bos_id: int | None
    pad_id: int | None
    split_special_tokens: bool = False
    """Text of a special token is spelled out, as transformers does by the setting of this name."""
    original: Path | None = None
    """The tokenizer.json that is saved as it is; None if `content` is what to save."""
    settings: Mapping[str, Any] | None = None
    """The tokenizer_config.json to save; None if the companions have one."""
    companions: tuple[Path, ...] = ()
    """Other files to save as they are, under the names that they have in their folder."""
    named_tokens: Mapping[str, str] = field(default_factory=dict)
    """Tokens that the settings name, by the setting: `mask_token`, `cls_token`, …."""
    origin: str = TOKENIZER_FILE
    """What decided the ids, in words."""

    @property
    def folder(self) -> Path:
        """Folder of the companions."""
        return self.path if self.path.is_dir() else self.path.parent


def check_was_fetched(file: Path) -> None:
    """Refuse a file that is empty, or a note of Git LFS in place of the file.

    Raises:
        DataFormatError: It is.
        OSError: It cannot be read.
    """
    if not file.stat().st_size:
        raise DataFormatError(f"{file} is empty", hint="it was not fetched or copied completely")
    if is_lfs_pointer(file):
        raise DataFormatError(f"{file} is a pointer of Git LFS, not the file itself", hint=LFS_HINT)


def read_object(file: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        DataFormatError: The file cannot be read, or holds something else.
    """
    try:
        content = orjson.loads(file.read_bytes())
    except OSError as error:
        raise DataFormatError(f"{file} cannot be read: {error.strerror}") from error
    except orjson.JSONDecodeError as error:
        check_was_fetched(file)
        raise DataFormatError(f"{file} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise DataFormatError(f"{file} holds a {type(content).__name__}, expected a JSON object")
    return content


def read_object_if_there(file: Path) -> dict[str, Any]:
    """Return the same, and an empty object if there is no such file."""
    return read_object(file) if file.is_file() else {}


def read_definition(file: Path) -> dict[str, Any]:
    """Read a tokenizer.json without its padding and truncation: a corpus is never cut.

    Raises:
        DataFormatError: It has no model with a vocabulary, or its added tokens are malformed.
    """
    definition = read_object(file)
    model = definition.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict | list):
        raise DataFormatError(f"{file} is not a tokenizer.json: it has no model with a vocabulary")
    added = definition.get("added_tokens") or []
    if not isinstance(added, list) or not all(_is_added_token(token) for token in added):
        raise DataFormatError(f"{file} is not a tokenizer.json: added_tokens is no list of tokens with content and id")
    definition |= {"added_tokens": added, "padding": None, "truncation": None}
    try:
        followed = _are_ids_followed(model["vocab"], added)
    except (TypeError, IndexError, KeyError) as error:
        raise DataFormatError(f"{file} is not a tokenizer.json: its vocabulary is malformed ({error})") from error
    return definition if followed else _as_the_library_has_it(definition, file)


def find_token(definition: Mapping[str, Any], content: str) -> int | None:
    """Id of a token, added ones first."""
    for token in definition["added_tokens"]:
        if token["content"] == content:
            return int(token["id"])
    vocabulary = definition["model"]["vocab"]
    if isinstance(vocabulary, dict):
        return vocabulary.get(content)
    return next((index for index, (piece, _score) in enumerate(vocabulary) if piece == content), None)


def token_content(value: object) -> str | None:
    """Return the text of a token as settings give it, a string or an object with `content`; None for anything else."""
    content = value.get("content") if isinstance(value, dict) else value
    return content if isinstance(content, str) else None


def named_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """Texts of the tokens that settings name, by the setting: `mask_token`, `cls_token`, …."""
    tokens = {name: token_content(value) for name, value in settings.items() if name.endswith("_token")}
    return {name: token for name, token in tokens.items() if token is not None}


def _are_ids_followed(vocabulary: Mapping[str, int] | Sequence[Any], added: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether the added tokens have the ids that the library gives them: the vocabulary's, or the next."""
    known = vocabulary if isinstance(vocabulary, dict) else {piece[0]: index for index, piece in enumerate(vocabulary)}
    expected = len(known)
    if max(known.values(), default=-1) != expected - 1:
        return False
    for token in added:
        content = token["content"]
        if token["id"] != known.get(content, expected):
            return False
        expected += content not in known
    return len({token["content"] for token in added}) == len(added)


def _as_the_library_has_it(definition: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """Return the definition with the ids that its added tokens really get, whatever the file says."""
    from tokenizers import Tokenizer as Backend

    try:
        content: dict[str, Any] = orjson.loads(Backend.from_buffer(orjson.dumps(definition)).to_str())
    except Exception as error:  # the library raises bare Exception
        raise DataFormatError(f"{file} is not a tokenizer that the tokenizers library can load: {error}") from error
    return content


def _is_added_token(token: object) -> bool:
    return isinstance(token, dict) and isinstance(token.get("content"), str) and isinstance(token.get("id"), int)
