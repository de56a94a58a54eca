"""A block of raw text to arrays of token ids: the work of one thread of the pipeline."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from megatron_7b.data._index import frame_documents as frame_natively
from megatron_7b.data.preprocess.output import TokenDtype, TokenIds
from megatron_7b.data.reading.blocks import Block
from megatron_7b.data.reading.records import BadRecord, parse_block


class Difference(Protocol):
    """A text on which a fast engine was wrong; its `str` says where."""

    @property
    def text_index(self) -> int:
        """Which text of the batch."""


class CheckedIds(Protocol):
    """A batch encoded, and what of it was compared with the reference."""

    @property
    def ids(self) -> NDArray[np.uint32]:
        """Of all texts, one after another [total]."""

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Ids of each text."""

    @property
    def disagreements(self) -> Sequence[Difference]:
        """Texts that needed the reference."""

    @property
    def compared_texts(self) -> int:
        """Texts, whole or in part."""

    @property
    def compared_characters(self) -> int:
        """How much text that was."""


class BatchEncoder(Protocol):
    """What the pipeline wants of a tokenizer; called from several threads at once."""

    @property
    def name(self) -> str:
        """Library and version."""

    def encode_checked(self, texts: Sequence[str], *, sample_characters: int = 0) -> CheckedIds:
        """Encode texts, comparing at least `sample_characters` of them."""


@dataclass(frozen=True, kw_only=True)
class EncodingOptions:
    """What becomes of a text."""

    keys: tuple[str, ...]
    dtype: TokenDtype
    eod_id: int | None = None
    """Appended to every document that has tokens; None appends nothing."""
    bos_id: int | None = None
    """Put before every document that has tokens."""
    split_sentences: Callable[[str], list[str]] | None = None


@dataclass(slots=True)
class EncodedTexts:
    """One key of a block."""

    ids: TokenIds
    lengths: NDArray[np.int64]
    sentence_lengths: list[NDArray[np.int32]] | None


@dataclass(slots=True)
class EncodedBlock:
    """A block ready to be written, key by key."""

    per_key: list[EncodedTexts]
    bad: list[BadRecord]
    differences: list[str]
    """Documents that a fast engine got wrong, in words."""
    num_records: int
    compared_texts: int = 0
    compared_characters: int = 0


def encode_block(block: Block, encoder: BatchEncoder, options: EncodingOptions, sample_characters: int) -> EncodedBlock:
    """Parse and encode a block."""
    parsed = parse_block(block, options.keys)
    encoded = EncodedBlock([], parsed.bad, [], len(parsed.numbers))
    for texts in parsed.texts:
        pieces, owners = _split_texts(texts, options)
        checked = encoder.encode_checked(pieces, sample_characters=sample_characters)
        encoded.compared_texts += checked.compared_texts
        encoded.compared_characters += checked.compared_characters
        for difference in checked.disagreements:
            record = difference.text_index if owners is None else int(owners[difference.text_index])
            encoded.differences.append(f"{block.source}:{parsed.numbers[record]}: {difference}")
        encoded.per_key.append(_assemble(checked.ids, checked.lengths, owners, len(texts), options))
    return encoded


def _split_texts(texts: list[str], options: EncodingOptions) -> tuple[list[str], NDArray[np.int64] | None]:
    """Texts to sentences, and which text each belongs to; without a splitter the texts themselves."""
    if options.split_sentences is None:
        return texts, None
    sentences = [options.split_sentences(text) for text in texts]
    owners = np.repeat(np.arange(len(texts)), [len(of_one) for of_one in sentences])
    return [sentence for of_one in sentences for sentence in of_one], owners


def _assemble(
    ids: NDArray[np.uint32],
    lengths: NDArray[np.int64],
    owners: NDArray[np.int64] | None,
    num_texts: int,
    options: EncodingOptions,
) -> EncodedTexts:
    if owners is None:
        framed, document_lengths = frame_documents(ids, lengths, options)
        return EncodedTexts(framed, document_lengths, None)
    documents = np.bincount(owners, weights=lengths, minlength=num_texts).astype(np.int64)
    framed, document_lengths = frame_documents(ids, documents, options)
    return EncodedTexts(framed, document_lengths, _group_sentences(lengths, owners, num_texts, options))


def frame_documents(
    ids: NDArray[np.uint32], lengths: NDArray[np.int64], options: EncodingOptions
) -> tuple[TokenIds, NDArray[np.int64]]:
    """Put bos before and eod after each document that has tokens, in the corpus's id width."""
    framed, framed_lengths = frame_natively(ids, lengths, options.dtype.itemsize, options.bos_id, options.eod_id)
    return framed, framed_lengths


def _group_sentences(
    lengths: NDArray[np.int64], owners: NDArray[np.int64], num_texts: int, options: EncodingOptions
) -> list[NDArray[np.int32]]:
    """Sentence lengths per document; bos counts to the first, eod to the last, empty sentences are none."""
    kept = lengths > 0
    counts = np.bincount(owners[kept], minlength=num_texts)
    grouped = np.split(lengths[kept].astype(np.int32), np.cumsum(counts)[:-1]) if num_texts else []
    for of_one in grouped:
        if len(of_one):
            of_one[0] += options.bos_id is not None
            of_one[-1] += options.eod_id is not None
    return grouped
