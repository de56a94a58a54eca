"""Hugging Face tokenizers, run by the `tokenizers` library alone."""

import json
import shutil
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from megatron_7b.errors import DataFormatError
from megatron_7b.tokenizer.base import SpecialRole, find_usual_name, hash_identity
from megatron_7b.tokenizer.definition import CONFIG_FILE, TOKENIZER_FILE, Definition, find_token

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend


class HuggingFaceTokenizer:
    """Runs a definition.

    Raises:
        DataFormatError: It splits words at random (BPE dropout), so that a text has no ids of its own.

    Text of a special token inside a document becomes that token, as with `tokenizers` itself. Padding and truncation
    that the file may ask for (sentence encoders ship with 128 tokens) are switched off: a corpus is never cut.
    """

    kind = "hugging_face"

    def __init__(self, definition: Definition) -> None:
        self.path: Path | None = definition.path
        self.eod_id, self.bos_id, self.pad_id = definition.eod_id, definition.bos_id, definition.pad_id
        self.origin = definition.origin
        """What decided the ids, in words."""
        self._definition = definition
        self._content = definition.content
        if dropout := self._content["model"].get("dropout"):
            raise DataFormatError(
                f"{definition.original or definition.path} splits words at random (model.dropout is {dropout}): "
                "every reading gives other ids",
                hint='set "dropout" to null in its tokenizer.json',
            )
        self._added_tokens: list[dict[str, Any]] = self._content["added_tokens"]
        self._json = orjson.dumps(self._content, option=orjson.OPT_SORT_KEYS)

    @property
    def json(self) -> bytes | None:
        """The definition in canonical form, without padding and truncation; None if it does not say everything."""
        return None if self._definition.split_special_tokens else self._json

    @cached_property
    def backend(self) -> "Backend":
        """The library's object, built at first use: a fast engine may never need it.

        Raises:
            DataFormatError: The library does not know this definition.
        """
        from tokenizers import Tokenizer as Backend

        try:
            backend = Backend.from_buffer(self._json)
        except Exception as error:  # the library raises bare Exception
            source = self._definition.original or self.path
            raise DataFormatError(
                f"{source} is not a tokenizer that the tokenizers library can load: {error}"
            ) from error
        backend.encode_special_tokens = self._definition.split_special_tokens
        return backend

    @cached_property
    def identity(self) -> str:
        """Hash of the canonical definition and the roles, blind to formatting, padding and truncation."""
        roles = orjson.dumps([self.eod_id, self.bos_id, self.pad_id])
        splits = (b"split_special_tokens",) if self._definition.split_special_tokens else ()
        return hash_identity(self.kind, self._json, roles, *splits)

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest id, so that gaps in the vocabulary are no trap."""
        vocabulary = self._content["model"]["vocab"]
        ids = vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary))
        added = (token["id"] for token in self._added_tokens)
        return 1 + max(max(ids, default=-1), max(added, default=-1))

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Added tokens that are marked special, and those that have a role."""
        added = {token["id"] for token in self._added_tokens if token.get("special")}
        roles = {role for role in (self.eod_id, self.bos_id, self.pad_id) if role is not None}
        return frozenset(added | roles)

    def special_id(self, role: SpecialRole) -> int | None:
        """Return the token that the settings name, else the special token with a usual name."""
        named = self._definition.named_tokens.get(f"{role}_token")
        if named is not None and (token := find_token(self._content, named)) is not None:
            return token
        if role == "pad" and self.pad_id is not None:
            return self.pad_id
        special = {token["content"]: int(token["id"]) for token in self._added_tokens if token.get("special")}
        return find_usual_name(role, special)

    def encode(self, text: str) -> list[int]:
        """`tokenizers`' own ids, without special tokens at the ends."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the same for many texts, on all cores, offsets not tracked."""
        return [encoding.ids for encoding in self.backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Return the same, with the library's own offsets."""
        encoding = self.backend.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text with special tokens written out."""
        return self.backend.decode(list(ids), skip_special_tokens=False)

    def spell(self, token: int) -> str | None:
        """Return the token as the vocabulary writes it."""
        return self.backend.id_to_token(token)

    def save(self, folder: Path) -> None:
        """Write tokenizer.json and what gives its tokens their roles, so that tokenizer.json alone decides."""
        folder.mkdir(parents=True, exist_ok=True)
        definition = self._definition
        for file in definition.companions:
            _copy(file, folder / file.relative_to(definition.folder))
        if definition.original is None:
            (folder / TOKENIZER_FILE).write_bytes(self._json)
        else:
            _copy(definition.original, folder / TOKENIZER_FILE)
        if definition.settings is not None:
            settings = json.dumps(definition.settings, indent=2, ensure_ascii=False)
            (folder / CONFIG_FILE).write_text(settings + "\n", encoding="utf-8")


def _copy(source: Path, target: Path) -> None:
    if source.resolve() != target.resolve():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
