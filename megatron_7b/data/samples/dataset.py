"""The samples of a run, by number: of one corpus or of a blend."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_7b.data._index import Batcher, CappedBlend
from megatron_7b.data.samples.sample_order import Continuation, SampleOrder
from megatron_7b.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class RecordsOfBatch:
    """The records of a microbatch, whose rows are laid one after the other: b × s places."""

    begins: NDArray[np.int64]
    """Place where each part of a record begins, [parts]."""
    lengths: NDArray[np.int64]
    """Tokens of each part, [parts]."""
    record: NDArray[np.int64]
    """Which record of the microbatch each part is of, ascending, [parts]."""
    numbers: NDArray[np.int64]
    """Which record of its corpus each is, [records]."""
    values: NDArray[np.float32]
    """Numbers of each record as a whole, [records, k]."""
    token_values: NDArray[np.float32]
    """A number per token, 0 in padding, [b, s]."""


class TopLogits(NamedTuple):
    """What a teacher finds most probable, for each token of a microbatch."""

    ids: NDArray[np.uint32]
    """[b, s, k]."""
    logps: NDArray[np.floating]
    """Logarithms of their probabilities, then of all other tokens together, [b, s, k + 1]."""


@dataclass(frozen=True)
class Batch:
    """One microbatch. Its arrays [b, s] share a buffer, which is reused once nothing refers to any of them."""

    tokens: NDArray[np.int64]
    """Inputs, [b, s]."""
    labels: NDArray[np.int64]
    """The token after each input, [b, s]."""
    loss_mask: NDArray[np.float32]
    """1 where the prediction counts, [b, s]."""
    position_ids: NDArray[np.int64]
    """0 … s - 1 over the whole sample, or over each of its documents where they are reset, [b, s]."""
    cu_seqlens: NDArray[np.int32] | None = None
    """Cumulative lengths of the documents when the rows are laid one after the other, [documents + 1]: 0, …, b × s.

    A new document always begins with each row, even if the row continues a document of an earlier sample. None unless
    boundaries were requested.
    """
    tokentype_ids: NDArray[np.int64] | None = None
    """Which sentence of a pair a token is of, [b, s]; None for models that do not ask."""
    decoder_tokens: NDArray[np.int64] | None = None
    """What the decoder of an encoder-decoder reads, [b, s_d]; labels and loss mask then belong to these, [b, s_d]."""
    attention_mask: NDArray[np.bool_] | None = None
    """False where `tokens` are padding, [b, s]; None: nowhere."""
    is_word_before: NDArray[np.bool_] | None = None
    """Which of the predictions that count are of visible words before hidden ones, [b, s]; None: none is."""
    pair_labels: NDArray[np.int64] | None = None
    """Of each row, which of two classes its pair of sentences is of, [b]; None where rows are no pairs."""
    records: RecordsOfBatch | None = None
    """Of rows of records; None for rows of text."""

    top_logits: TopLogits | None = None
    """What a teacher has said of the tokens, if that was written."""

    def counting(self, is_counted: NDArray[np.bool_]) -> "Batch":
        """Return it with rows that count nothing, whose records are none; `is_counted` is [b]."""
        loss_mask = np.where(is_counted[:, None], self.loss_mask, np.float32(0))
        records = self.records
        if records is not None and not is_counted.all():
            kept = is_counted[records.begins // self.tokens.shape[1]]
            parts = {name: getattr(records, name)[kept] for name in ("begins", "lengths", "record")}
            values = np.where(is_counted[:, None], records.token_values, np.float32(0))
            records = replace(records, **parts, token_values=values)
        return replace(self, loss_mask=loss_mask, records=records)


@dataclass(frozen=True)
class DatasetPart:
    """One set of a dataset."""

    prefix: str
    share: float
    """Of the dataset's samples; the shares add up to 1."""
    first_document: int
    end_document: int
    num_tokens: int
    num_samples: int
    """Samples that begin in the first epoch (of the single pass, where it isn't shuffled)."""
    max_samples: int | None = None
    """Samples after which the set has run out (`data.max_epochs`); None: never."""
    samples_per_epoch: Fraction = Fraction(0)
    """Samples in which every token is read once; a fraction, as the last one of an epoch may reach into the next."""


class NumberedSamples:
    """Samples by global number, of one set or of a blend: which sets they are of, how many, in which order."""

    def __init__(
        self, parts: Sequence[DatasetPart], continuation: Continuation, *, left_out: Sequence[str] = ()
    ) -> None:
        self.parts = tuple(parts)
        self.order: SampleOrder = continuation.order
        self.notes = continuation.notes
        """What a user should know about how this continues what a run has read."""
        self.left_out = tuple(left_out)
        """Sets of the blend that have too little text in this split for one sample."""

    @property
    def seq_length(self) -> int:
        """Input tokens per sample."""
        return self.order.seq_length

    @property
    def num_tokens(self) -> int:
        """Tokens of all sets, each counted once."""
        return sum(part.num_tokens for part in self.parts)

    @property
    def num_samples(self) -> int:
        """Samples of all sets in one epoch of each."""
        return sum(part.num_samples for part in self.parts)

    @property
    def end(self) -> int | None:
        """Samples after which all sets have run out; None where one never does."""
        return self.order.end

    @cached_property
    def _blend(self) -> CappedBlend:
        return self.order.blend()

    def locate_in_sets(self, indices: Sequence[int] | NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the set of each global number, and its number within that set, [n] each."""
        numbers = np.asarray(indices, dtype=np.int64) - self.order.first_sample
        low = int(numbers.min())
        sets, samples = self._blend.picks(low, int(numbers.max()) - low + 1)
        consumed = np.array([one.consumed for one in self.order.sets], dtype=np.int64)
        sets, samples = sets[numbers - low], samples[numbers - low]
        return sets, samples + consumed[sets]

    def check_end(self, num_samples: int) -> None:
        """Refuse a run that is longer than its data.

        Args:
            num_samples: Of the whole run, those that were consumed before a resume included.

        Raises:
            ConfigError: All sets are exhausted before `num_samples`.
        """
        if self.end is not None and num_samples > self.end:
            raise ConfigError(
                f"the run takes {num_samples:,} samples of {self.seq_length:,} tokens, but with data.max_epochs all "
                f"sets have run out after {self.end:,}",
                hint="shorten training.train_steps, raise data.max_epochs, or leave one set without a bound (0)",
            )


class Dataset(NumberedSamples):
    """Windows of the token stream by global number, from 0 without end: after the first epoch comes the next one.

    Only if `data.max_epochs` limits every set do the samples end, once all sets are exhausted.

    The number is the whole state: sample i has the same tokens in every process, whatever was read before.
    """

    def __init__(
        self,
        parts: Sequence[DatasetPart],
        batcher: Batcher,
        continuation: Continuation,
        *,
        left_out: Sequence[str] = (),
    ) -> None:
        super().__init__(parts, continuation, left_out=left_out)
        self._batcher = batcher

    def batch(self, indices: Sequence[int] | NDArray[np.int64]) -> Batch:
        """Return the samples of these global numbers, in this order. Releases the GIL; any thread may call it.

        Raises:
            DataFormatError: A token id is outside the vocabulary.
            IndexError: All sets are exhausted before that.
        """
        return Batch(*self._batcher.assemble(np.asarray(indices, dtype=np.int64)))

    def locate(self, indices: Sequence[int] | NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the set, and the sample number within it, of each global number."""
        return self._batcher.locate(np.asarray(indices, dtype=np.int64))
