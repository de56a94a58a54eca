"""The samples of fine-tuning: rows of whole records, by number.

Sample i is computed from (seed, i): rows are shuffled in each epoch by a keyed bijection, several sets take turns as
their weights say. A row holds one record, or as many as fit; in attention all their parts are kept apart.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from megatron_7b.config.schema import DataConfig
from megatron_7b.data._index import Permutation
from megatron_7b.data.records.corpus import RecordCorpus, check_kind
from megatron_7b.data.samples.dataset import Batch, NumberedSamples, RecordsOfBatch
from megatron_7b.data.samples.packing import Packing, pack_documents
from megatron_7b.data.samples.sample_order import Reached
from megatron_7b.data.samples.sampling import MASK64, stream_key
from megatron_7b.data.samples.sets import UNKNOWN_CONTENTS, OpenedSet, Source, find_sets, parts_of, whole_corpus
from megatron_7b.data.samples.split import Split
from megatron_7b.errors import DataFormatError


@dataclass(frozen=True, kw_only=True)
class RecordLayout:
    """How records are laid out.

    Attributes:
        seq_length: Tokens of a row.
        seed: The run's.
        packed: Whether records share rows.
        pad_id: What fills up rows; also the label if there is none.
        name: What kind of records they are, in the plural, as `write_records` marks corpora.
    """

    seq_length: int
    seed: int
    packed: bool
    pad_id: int
    name: str = "records"


class _RowsOfSet:
    """The records of one set in rows of a fixed length.

    Args:
        opened: The set.
        seq_length: Tokens of a row.
        packed: Whether records share rows.

    Raises:
        DataFormatError: A file is damaged.
    """

    def __init__(self, opened: OpenedSet, seq_length: int, *, packed: bool) -> None:
        self.opened = opened
        self.corpus = RecordCorpus(opened.dataset.prefix)
        lengths = self.corpus.lengths[slice(*opened.documents)]
        kept = _kept_lengths(self.corpus, seq_length)[slice(*opened.documents)]
        self.packing = pack_documents(kept, seq_length) if packed else _one_per_row(kept, seq_length)
        self.num_cut = int(((kept > 0) & (kept < lengths)).sum())
        self.num_left_out = int(((kept == 0) & (lengths > 0)).sum())

    @property
    def num_rows(self) -> int:
        """Rows."""
        return self.packing.num_rows


class _BatchBuilder:
    """Fills the arrays of a batch, row by row."""

    def __init__(self, num_rows: int, seq_length: int, num_values: int, pad_id: int) -> None:
        shape = (num_rows, seq_length)
        self._tokens, self._labels = (np.full(shape, pad_id, np.int64) for _ in range(2))
        self._loss_mask, self._token_values = (np.zeros(shape, np.float32) for _ in range(2))
        self._positions = np.zeros(shape, np.int64)
        self._num_values = num_values
        self._segments: list[int] = []
        self._sequences: list[tuple[int, int, int]] = []
        self._values: list[NDArray[np.float32]] = []
        self._numbers: list[int] = []

    def add_row(self, row: int, rows: _RowsOfSet, number: int) -> None:
        """Write a row of a set."""
        place, packing = 0, rows.packing
        seq_length = packing.seq_length
        for piece in range(*packing.row_begin[number : number + 2]):
            record = rows.opened.documents[0] + int(packing.document[piece])
            place = self._add_record(row, place, rows.corpus, record, int(packing.length[piece]))
        if place < seq_length:
            self._segments.append(row * seq_length + place)
            self._positions[row, place:] = np.arange(seq_length - place)

    def _add_record(self, row: int, place: int, corpus: RecordCorpus, record: int, length: int) -> int:
        ids, numbers = corpus.tokens(record, length), corpus.token_values(record, length)
        parts = corpus.parts(record)
        begin = 0
        for part in [length] if len(parts) == 1 else parts.tolist():
            first, end = place + begin, place + begin + part
            within = slice(begin, begin + part)
            self._segments.append(row * self._tokens.shape[1] + first)
            self._sequences.append((row * self._tokens.shape[1] + first, part, len(self._values)))
            self._tokens[row, first:end] = ids[within]
            self._labels[row, first : end - 1] = ids[within][1:]
            self._loss_mask[row, first : end - 1] = numbers[within][1:]
            self._token_values[row, first:end] = numbers[within]
            self._positions[row, first:end] = np.arange(part)
            begin += part
        self._values.append(corpus.values(record))
        self._numbers.append(record)
        return place + length

    def batch(self) -> Batch:
        """Return what was written."""
        begins, lengths, of_record = np.array(self._sequences, np.int64).reshape(-1, 3).T
        records = RecordsOfBatch(
            begins=begins,
            lengths=lengths,
            record=of_record,
            numbers=np.array(self._numbers, np.int64),
            values=np.stack(self._values) if self._values else np.empty((0, self._num_values), np.float32),
            token_values=self._token_values,
        )
        boundaries = np.array([*self._segments, self._tokens.size], np.int32)
        return Batch(self._tokens, self._labels, self._loss_mask, self._positions, boundaries, records=records)


class RecordDataset(NumberedSamples):
    """Rows of records by global sample number, from 0 without end."""

    def __init__(
        self,
        source: Source,
        layout: RecordLayout,
        *,
        shuffle: bool = True,
        contents: Mapping[str, str] = UNKNOWN_CONTENTS,
        reached: Reached | None = None,
    ) -> None:
        """Open the records of a split.

        Args:
            source: The split; its corpora are those that `write_records` wrote.
            layout: How they are laid out.
            shuffle: False reads every set in the order of its rows, in every epoch.
            contents: `corpus_fingerprint` of each set by its prefix.
            reached: What a resumed run has read of `train`; None for a fresh one.

        Raises:
            ConfigError: The samples would not continue those of `reached`.
            DataFormatError: A file is damaged, or there are no records of this kind.
        """
        name, seq_length, seed = layout.name, layout.seq_length, layout.seed
        for one in source.sets:
            check_kind(one.dataset.prefix, name)
        opened = [_RowsOfSet(one, seq_length, packed=layout.packed) for one in source.sets]
        kept = [rows for rows in opened if rows.num_rows]
        for rows in opened if not source.may_leave_out or not kept else ():
            if rows.num_left_out and not rows.num_rows:
                raise DataFormatError(
                    f"all {rows.num_left_out:,} {name} of {rows.opened.dataset.prefix} are longer than {seq_length:,} "
                    "tokens",
                    hint="set data.seq_length to what the longest need",
                )
            if not rows.num_rows:
                raise DataFormatError(
                    f"{rows.opened.dataset.prefix} has no {name} for {source.split}",
                    hint="give it a larger share in data.split, or name a file as data.valid",
                )
        _check_alike(kept)
        of_sets = [rows.opened for rows in kept]
        rates = [Fraction(rows.num_rows) for rows in kept]
        cut = f"{name} that share rows" if layout.packed else f"one of the {name} per row"
        continuation = source.order(
            of_sets, rates, seq_length=seq_length, seed=seed, cut=cut, contents=contents, reached=reached
        )
        order = continuation.order
        super().__init__(
            parts_of(of_sets, order, [rows.num_rows for rows in kept], rates),
            continuation,
            left_out=source.left_out(of_sets),
        )
        self.notes = (*self.notes, *_notes(kept, seq_length, name))
        self._sets, self._pad_id = kept, layout.pad_id
        self._keys = [
            stream_key(seed, source.split, one.number, pass_begin=order.pass_begin) if shuffle else None
            for one in order.sets
        ]

    @property
    def num_values(self) -> int:
        """Numbers that each record has as a whole."""
        return self._sets[0].corpus.num_values

    @property
    def corpora(self) -> list[RecordCorpus]:
        """The sets, in the order of `parts`."""
        return [rows.corpus for rows in self._sets]

    def records_of(self, index: int) -> NDArray[np.int64]:
        """Return which records of its corpus a sample holds, [records]."""
        ((which,), (sample,)) = self.locate_in_sets([index])
        rows, number = self._row(int(which), int(sample))
        pieces = slice(*rows.packing.row_begin[number : number + 2])
        return rows.opened.documents[0] + rows.packing.document[pieces].astype(np.int64)

    def batch(self, indices: Sequence[int] | NDArray[np.int64]) -> Batch:
        """Return the samples of these numbers; `cu_seqlens` has a segment for each part, and for padding."""
        builder = _BatchBuilder(len(indices), self.seq_length, self.num_values, self._pad_id)
        located = zip(*(found.tolist() for found in self.locate_in_sets(indices)), strict=True)
        for place, (which, sample) in enumerate(located):
            builder.add_row(place, *self._row(which, sample))
        return builder.batch()

    def _row(self, which: int, number: int) -> tuple[_RowsOfSet, int]:
        """Return a set, and the row of it that its sample of a number reads."""
        rows, key = self._sets[which], self._keys[which]
        epoch, place = divmod(number, rows.num_rows)
        return rows, place if key is None else Permutation(rows.num_rows, (key + epoch) & MASK64)(place)


def open_records(
    config: DataConfig,
    split: Split,
    layout: RecordLayout,
    *,
    contents: Mapping[str, str] = UNKNOWN_CONTENTS,
    reached: Reached | None = None,
) -> RecordDataset:
    """Open the records of one split; the errors are those of `RecordDataset`.

    Raises:
        ConfigError: Also if the blend or the split is malformed.
    """
    return RecordDataset(find_sets(config, split), layout, contents=contents, reached=reached)


def open_whole_corpus(prefix: str, layout: RecordLayout) -> RecordDataset:
    """Open all records of a corpus, once and in their order.

    Raises:
        DataFormatError: A file is damaged, or there are no records.
    """
    return RecordDataset(whole_corpus(prefix), layout, shuffle=False)


def _kept_lengths(corpus: RecordCorpus, longest: int) -> NDArray[np.int64]:
    """Return how many tokens of each record to keep, [records].

    A record of one part that is too long ends with the last run of trained tokens that fits, so that no reply is
    learned without its end; if not even the first one fits, it is cut anywhere. A record of several parts needs all of
    them: if they do not fit, it is left out, with 0 tokens.

    Args:
        corpus: The records.
        longest: Most tokens.
    """
    kept = np.minimum(corpus.lengths, longest)
    for number in np.flatnonzero(corpus.lengths > longest).tolist():
        if len(corpus.parts(number)) > 1:
            kept[number] = 0
            continue
        mask = corpus.token_values(number, longest + 1)
        ends = np.flatnonzero((mask[:-1] != 0) & (mask[1:] == 0))
        if len(ends):
            kept[number] = ends[-1] + 1
    return kept


def _one_per_row(lengths: NDArray[np.int64], seq_length: int) -> Packing:
    """Return rows of one record each, in their order."""
    (documents,) = np.nonzero(lengths)
    return Packing(
        seq_length=seq_length,
        row_begin=np.arange(len(documents) + 1),
        document=documents,
        offset=np.zeros(len(documents), np.int64),
        length=lengths[documents],
    )


def _check_alike(sets: Sequence[_RowsOfSet]) -> None:
    """Refuse sets whose records have another number of values.

    Raises:
        DataFormatError: There are such.
    """
    for rows in sets[1:]:
        if rows.corpus.num_values != sets[0].corpus.num_values:
            one, other = sets[0].corpus, rows.corpus
            raise DataFormatError(
                f"the records of {other.dataset.prefix} have {other.num_values} values, those of {one.dataset.prefix} "
                f"have {one.num_values}",
                hint="sets that are read together are made for one task",
            )


def _notes(sets: Sequence[_RowsOfSet], seq_length: int, name: str) -> list[str]:
    cut = [
        f"{rows.num_cut:,} {name} of {rows.opened.dataset.prefix} are longer than {seq_length:,} tokens, and cut after "
        "the last reply that fits"
        for rows in sets
        if rows.num_cut
    ]
    left_out = [
        f"{rows.num_left_out:,} {name} of {rows.opened.dataset.prefix} are longer than {seq_length:,} tokens, and left "
        "out: a larger data.seq_length keeps them"
        for rows in sets
        if rows.num_left_out
    ]
    return cut + left_out
