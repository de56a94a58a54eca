"""The protocol that every kind of tokenizer implements."""

import hashlib
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, Protocol

type SpecialRole = Literal["mask", "cls", "sep", "pad"]
"""What a token is for in the input of an encoder: to hide another, to begin a sample, to end one, to fill up."""

_USUAL_NAMES: Mapping[str, tuple[str, ...]] = {
    "mask": ("[MASK]", "<mask>"),
    "cls": ("[CLS]", "<s>"),
    "sep": ("[SEP]", "</s>"),
    "pad": ("[PAD]", "<pad>", "<|pad|>"),
}


class Tokenizer(Protocol):
    """Text to token ids and back; made by `load_tokenizer`."""

    @property
    def kind(self) -> str:
        """`hugging_face`, `sentencepiece`, `tiktoken` or `bytes`."""

    @property
    def path(self) -> Path | None:
        """Where it was loaded from; None for the built-in byte tokenizer."""

    @property
    def origin(self) -> str:
        """What decides the ids, in words."""

    @property
    def identity(self) -> str:
        """Hash of everything that decides which ids a text gets; equal wherever the files are."""

    @property
    def vocab_size(self) -> int:
        """True size: one more than the largest id, added tokens included, without any padding."""

    @property
    def eod_id(self) -> int | None:
        """Token that ends a document (a Hugging Face tokenizer's eos)."""

    @property
    def bos_id(self) -> int | None:
        """Token that begins a text."""

    @property
    def pad_id(self) -> int | None:
        """Token that fills up a batch."""

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids of control tokens, which have no text."""

    def special_id(self, role: SpecialRole) -> int | None:
        """Special token of a role, as the files declare it, else by its usual name; None if there is none."""

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; nothing is added at its ends."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of several texts, encoded on all cores where the library can."""

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids of a text, and where each token starts and stops in it, in characters.

        Tokens that are parts of one character all cover it.
        """

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids, special tokens included; bytes that are not UTF-8 become U+FFFD."""

    def spell(self, token: int) -> str | None:
        """Return a token's name in the vocabulary, control tokens included; None for an id without a token."""

    def save(self, folder: Path) -> None:
        """Write the files that make it up, so that `load_tokenizer(folder)` has the same identity."""


def find_usual_name(role: SpecialRole, special_tokens: Mapping[str, int]) -> int | None:
    """Return the special token that has a usual name of a role.

    Args:
        role: What it is for.
        special_tokens: Ids by name.
    """
    return next((special_tokens[name] for name in _USUAL_NAMES[role] if name in special_tokens), None)


def hash_identity(kind: str, *parts: bytes) -> str:
    """Return the hash of kind and parts, each with its length, so that no two lists of parts collide."""
    digest = hashlib.blake2b(kind.encode(), digest_size=16)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return f"{kind}:{digest.hexdigest()}"


def locate_bytes(text: str, lengths: Sequence[int]) -> list[tuple[int, int]]:
    """Return which characters of a text its tokens cover.

    Args:
        text: What was encoded.
        lengths: Of each token in bytes of UTF-8.
    """
    if text.isascii():
        stops = list(itertools.accumulate(lengths))
        return list(zip([0, *stops[:-1]], stops, strict=True)) if stops else []
    character_of_byte = [index for index, character in enumerate(text) for _ in character.encode()]
    spans, start = [], 0
    for length in lengths:
        covered = character_of_byte[start : start + length]
        spans.append((covered[0], covered[-1] + 1))
        start += length
    return spans
