"""SentencePiece models (`tokenizer.model` of the llama family and others)."""

import shutil
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from sentencepiece import SentencePieceProcessor

from megatron_7b.errors import DataFormatError
from megatron_7b.tokenizer.base import SpecialRole, find_usual_name, hash_identity

MODEL_FILE = "tokenizer.model"


class SentencePieceTokenizer:
    """A `.model` file. Text that looks like a control token is ordinary text, as SentencePiece has it."""

    kind = "sentencepiece"

    def __init__(self, path: Path) -> None:
        self.path: Path | None = path
        self.origin = "the SentencePiece model alone"
        self._content = path.read_bytes()
        try:
            self._processor = SentencePieceProcessor(model_proto=self._content)
        except RuntimeError as error:
            raise DataFormatError(f"{path} is not a SentencePiece model: {error}") from error
        if not self._content:  # which the library takes, and then fails at every call
            raise DataFormatError(f"{path} is empty, expected a SentencePiece model")
        self.vocab_size: int = self._processor.vocab_size()
        self.eod_id = _existing(self._processor.eos_id())
        self.bos_id = _existing(self._processor.bos_id())
        self.pad_id = _existing(self._processor.pad_id())

    @cached_property
    def identity(self) -> str:
        """Hash of the model file, which holds everything."""
        return hash_identity(self.kind, self._content)

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids of the model's control tokens."""
        return frozenset(token for token in range(self.vocab_size) if self._processor.is_control(token))

    @cached_property
    def byte_ids(self) -> frozenset[int]:
        """Ids of the pieces that are one byte of a character that the vocabulary lacks."""
        return frozenset(token for token in range(self.vocab_size) if self._processor.is_byte(token))

    def special_id(self, role: SpecialRole) -> int | None:
        """Return the control token with a usual name."""
        if role == "pad" and self.pad_id is not None:
            return self.pad_id
        return find_usual_name(role, {self._processor.id_to_piece(token): token for token in self.special_ids})

    def encode(self, text: str) -> list[int]:
        """SentencePiece's ids, nothing added at the ends."""
        ids: list[int] = self._processor.encode(text)
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the same for many texts, on all cores."""
        ids: list[list[int]] = self._processor.encode(list(texts), num_threads=-1)
        return ids

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Return the same, with the library's own offsets."""
        encoded = self._processor.encode(text, return_type="offset_mapping")
        return encoded["ids"], encoded["offsets"]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of the ids; control tokens give nothing."""
        text: str = self._processor.decode(list(ids))
        return text

    def spell(self, token: int) -> str | None:
        """Return the piece."""
        piece: str | None = self._processor.id_to_piece(token) if 0 <= token < self.vocab_size else None
        return piece

    def save(self, folder: Path) -> None:
        """Copy the model file."""
        folder.mkdir(parents=True, exist_ok=True)
        target = folder / MODEL_FILE
        if self.path is not None and self.path.resolve() != target.resolve():
            shutil.copyfile(self.path, target)


def _existing(token: int) -> int | None:
    """SentencePiece says -1 for a control token that the model lacks."""
    return token if token >= 0 else None
