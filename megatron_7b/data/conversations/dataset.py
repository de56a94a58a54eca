"""The samples of fine-tuning: rows of whole conversations, by number.

Sample i is computed from (seed, i): rows are shuffled in each epoch by a keyed bijection, several sets take turns as
their weights say. A row holds one conversation, or as many as fit; in attention they are kept apart.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from megatron_7b.config.schema import DataConfig
from megatron_7b.data._index import Permutation
from megatron_7b.data.conversations.corpus import ConversationCorpus
from megatron_7b.data.samples.dataset import Batch, NumberedSamples
from megatron_7b.data.samples.packing import Packing, pack_documents
from megatron_7b.data.samples.sample_order import Reached
from megatron_7b.data.samples.sampling import MASK64, stream_key
from megatron_7b.data.samples.sets import UNKNOWN_CONTENTS, OpenedSet, Source, find_sets, parts_of
from megatron_7b.data.samples.split import Split
from megatron_7b.errors import DataFormatError


@dataclass(frozen=True)
class _Row:
    """One row of the arrays of a batch, [s] each."""

    tokens: NDArray[np.int64]
    labels: NDArray[np.int64]
    loss_mask: NDArray[np.float32]
    position_ids: NDArray[np.int64]


class ConversationRows:
    """The conversations of one set in rows of a fixed length.

    Args:
        opened: The set.
        seq_length: Tokens of a row.
        packed: Whether conversations share rows.

    Raises:
        DataFormatError: A file is damaged.
    """

    def __init__(self, opened: OpenedSet, seq_length: int, *, packed: bool) -> None:
        self.opened = opened
        self._corpus = ConversationCorpus(opened.dataset.prefix)
        lengths = self._corpus.lengths[slice(*opened.documents)]
        kept = self._corpus.cut_lengths(seq_length)[slice(*opened.documents)]
        self._packing = pack_documents(kept, seq_length) if packed else _one_per_row(kept, seq_length)
        self.num_cut = int((lengths > seq_length).sum())

    @property
    def num_rows(self) -> int:
        """Rows."""
        return self._packing.num_rows

    def write(self, number: int, row: _Row) -> list[int]:
        """Write a row into a batch; returns where its conversations, and its padding, begin in it."""
        begins, place, packing = [], 0, self._packing
        for piece in range(*packing.row_begin[number : number + 2]):
            length = int(packing.length[piece])
            conversation = self.opened.documents[0] + int(packing.document[piece])
            ids, mask = self._corpus.conversation(conversation, length)
            begins.append(place)
            row.tokens[place : place + length] = ids
            row.labels[place : place + length - 1] = ids[1:]
            row.loss_mask[place : place + length - 1] = mask[1:]
            row.position_ids[place : place + length] = np.arange(length)
            place += length
        if place < packing.seq_length:
            begins.append(place)
            row.position_ids[place:] = np.arange(packing.seq_length - place)
        return begins


class ConversationDataset(NumberedSamples):
    """Rows of conversations by global sample number, from 0 without end."""

    def __init__(
        self,
        source: Source,
        *,
        seq_length: int,
        seed: int,
        packed: bool,
        pad_id: int,
        shuffle: bool = True,
        contents: Mapping[str, str] = UNKNOWN_CONTENTS,
        reached: Reached | None = None,
    ) -> None:
        """Open the conversations of a split.

        Args:
            source: The split; its corpora are those that `write_conversations` wrote.
            seq_length: Tokens of a row.
            seed: The run's.
            packed: Whether conversations share rows.
            pad_id: What fills up rows; also the label if there is none.
            shuffle: False reads every set in the order of its rows, in every epoch.
            contents: `corpus_fingerprint` of each set by its prefix.
            reached: What a resumed run has read of `train`; None for a fresh one.

        Raises:
            ConfigError: The samples would not continue those of `reached`.
            DataFormatError: A file is damaged, or there are no conversations.
        """
        opened = [ConversationRows(one, seq_length, packed=packed) for one in source.sets]
        kept = [rows for rows in opened if rows.num_rows]
        for rows in opened if not source.may_leave_out or not kept else ():
            if not rows.num_rows:
                raise DataFormatError(
                    f"{rows.opened.dataset.prefix} has no conversations for {source.split}",
                    hint="give it a larger share in data.split, or name a file as data.valid",
                )
        of_sets = [rows.opened for rows in kept]
        rates = [Fraction(rows.num_rows) for rows in kept]
        cut = "conversations that share rows" if packed else "a conversation per row"
        continuation = source.order(
            of_sets, rates, seq_length=seq_length, seed=seed, cut=cut, contents=contents, reached=reached
        )
        order = continuation.order
        super().__init__(
            parts_of(of_sets, order, [rows.num_rows for rows in kept], rates),
            continuation,
            left_out=source.left_out(of_sets),
        )
        self.notes = (*self.notes, *_notes(kept, seq_length))
        self._sets, self._pad_id = kept, pad_id
        self._keys = [
            stream_key(seed, source.split, one.number, pass_begin=order.pass_begin) if shuffle else None
            for one in order.sets
        ]

    def batch(self, indices: Sequence[int] | NDArray[np.int64]) -> Batch:
        """Return the samples of these numbers; `cu_seqlens` has a segment for each conversation, and for padding."""
        shape = (len(indices), self.seq_length)
        tokens, labels = (np.full(shape, self._pad_id, np.int64) for _ in range(2))
        loss_mask, position_ids = np.zeros(shape, np.float32), np.zeros(shape, np.int64)
        begins: list[int] = []
        located = zip(*(found.tolist() for found in self.locate_in_sets(indices)), strict=True)
        for place, (which, sample) in enumerate(located):
            rows, number = self._row(which, sample)
            row = _Row(tokens[place], labels[place], loss_mask[place], position_ids[place])
            begins += [place * self.seq_length + begin for begin in rows.write(number, row)]
        return Batch(tokens, labels, loss_mask, position_ids, np.array([*begins, tokens.size], np.int32))

    def _row(self, which: int, number: int) -> tuple[ConversationRows, int]:
        """Return a set, and the row of it that its sample of a number reads."""
        rows, key = self._sets[which], self._keys[which]
        epoch, place = divmod(number, rows.num_rows)
        return rows, place if key is None else Permutation(rows.num_rows, (key + epoch) & MASK64)(place)


def open_conversations(
    config: DataConfig,
    split: Split,
    *,
    seed: int,
    packed: bool,
    pad_id: int,
    contents: Mapping[str, str] = UNKNOWN_CONTENTS,
    reached: Reached | None = None,
) -> ConversationDataset:
    """Open the conversations of one split; the arguments and errors are those of `ConversationDataset`.

    Raises:
        ConfigError: Also if the blend or the split is malformed.
    """
    return ConversationDataset(
        find_sets(config, split),
        seq_length=config.seq_length,
        seed=seed,
        packed=packed,
        pad_id=pad_id,
        contents=contents,
        reached=reached,
    )


def _one_per_row(lengths: NDArray[np.int64], seq_length: int) -> Packing:
    """Return rows of one conversation each, in their order."""
    (documents,) = np.nonzero(lengths)
    return Packing(
        seq_length=seq_length,
        row_begin=np.arange(len(documents) + 1),
        document=documents,
        offset=np.zeros(len(documents), np.int64),
        length=lengths[documents],
    )


def _notes(sets: Sequence[ConversationRows], seq_length: int) -> list[str]:
    return [
        f"{rows.num_cut:,} conversations of {rows.opened.dataset.prefix} are longer than {seq_length:,} tokens, and "
        "cut after the last reply that fits"
        for rows in sets
        if rows.num_cut
    ]
