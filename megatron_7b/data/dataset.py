"""What a run reads: numbered samples of one corpus or of a blend."""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_7b.config.schema import DataConfig
from megatron_7b.data._index import Batcher
from megatron_7b.data.blend import BlendPart, integer_weights, parse_blend
from megatron_7b.data.indexed_dataset import IndexedDataset
from megatron_7b.data.sampling import open_stream, stream_key
from megatron_7b.data.split import SPLITS, Split, document_range, parse_split
from megatron_7b.errors import ConfigError

WHOLE = (1.0, 0.0, 0.0)


@dataclass(frozen=True)
class Batch:
    """One microbatch. The arrays [b, s] lie in one buffer, which is used again once nothing refers to any of them."""

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

    A row's beginning always begins one, even where it goes on with a document of which an earlier sample had the first
    part. None where nobody asked for boundaries.
    """


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


class Dataset:
    """Samples by their global number, from 0 without end: what lies behind the first epoch is the next one.

    The number is the whole state. Any process that asks for sample i gets the same tokens, whatever was asked before.
    """

    def __init__(self, parts: Sequence[DatasetPart], batcher: Batcher, *, seq_length: int) -> None:
        self.parts = tuple(parts)
        self.seq_length = seq_length
        self._batcher = batcher

    @property
    def num_tokens(self) -> int:
        """Tokens of all sets, each counted once."""
        return sum(part.num_tokens for part in self.parts)

    @property
    def num_samples(self) -> int:
        """Samples of all sets in one epoch of each."""
        return sum(part.num_samples for part in self.parts)

    def batch(self, indices: Sequence[int] | NDArray[np.int64]) -> Batch:
        """The samples of these global numbers, in this order. Releases the GIL; any thread may call it.

        Raises:
            DataFormatError: A token id lies outside of the vocabulary.
        """
        return Batch(*self._batcher.assemble(np.asarray(indices, dtype=np.int64)))

    def locate(self, indices: Sequence[int] | NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The set, and the sample number within it, of each global number."""
        return self._batcher.locate(np.asarray(indices, dtype=np.int64))


def open_split(
    config: DataConfig,
    split: Split,
    *,
    seed: int,
    vocab_size: int | None = None,
    eod_id: int | None = None,
) -> Dataset:
    """The shuffled, endless samples of one split.

    `train` and `test` are shares of `config.train`, and so is `valid` unless `config.valid` names a corpus, which is
    then read whole (and training gets the validation's share as well).

    Args:
        config: The data section.
        split: Which one.
        seed: The run's seed; determines the order, for each split its own.
        vocab_size: True vocabulary size that ids are checked against while batches are assembled; None: unchecked.
        eod_id: End-of-document token, for `config.eod_mask_loss`.

    Raises:
        ConfigError: The corpus, its weights or the split are malformed, the split's share is 0, or `eod_id` is missing.
        DataFormatError: A file is damaged, or a split of it is smaller than one sample.

    **Collective:** none.
    """
    if config.eod_mask_loss and eod_id is None:
        raise ConfigError(
            "data.eod_mask_loss is set, but the tokenizer has no end-of-document token",
            hint="use a tokenizer with one, or leave data.eod_mask_loss off",
        )
    entries, name, shares = _split_source(config, split)
    if shares[SPLITS.index(split)] == 0:
        raise ConfigError(
            f"data.split is {config.split!r}, which leaves no documents for {split!r}",
            hint="give it a share" + (", or name a corpus as data.valid" if split == "valid" else ""),
        )
    return _open(
        parse_blend(entries, name=name),
        split=split,
        shares=shares,
        seed=seed,
        seq_length=config.seq_length,
        vocab_size=vocab_size,
        shuffle=True,
        masked_eod=eod_id if config.eod_mask_loss else None,
        document_boundaries=config.reset_attention_mask,
        reset_position_ids=config.reset_position_ids,
    )


def open_sequential(
    prefix: str | Path, *, seq_length: int, vocab_size: int | None = None, masked_eod: int | None = None
) -> Dataset:
    """A whole corpus, read once in the order of the file: for evaluation.

    Samples 0 to num_samples - 1 predict every token but the first exactly once; in the last one, and in all samples
    behind it, what lies behind the corpus's end is token 0 with loss mask 0.

    Args:
        prefix: The corpus.
        seq_length: Input tokens per sample.
        vocab_size: As for `open_split`.
        masked_eod: Token after which the prediction is left out of the loss; None: none.

    Raises:
        DataFormatError: A file is damaged, or holds fewer than two tokens.
    """
    return _open(
        (BlendPart(prefix=str(prefix), weight=Fraction(1)),),
        split="train",
        shares=WHOLE,
        seed=0,
        seq_length=seq_length,
        vocab_size=vocab_size,
        shuffle=False,
        masked_eod=masked_eod,
    )


def has_split(config: DataConfig, split: Split) -> bool:
    """Whether every set of a split holds at least one sample. A corpus of few documents may have no validation share.

    Raises:
        ConfigError: The corpus, its weights or the split are malformed.
        DataFormatError: A file is damaged.
    """
    entries, name, shares = _split_source(config, split)
    if not entries or shares[SPLITS.index(split)] == 0:
        return False
    for part in parse_blend(entries, name=name):
        dataset = IndexedDataset(part.prefix)
        first, end = document_range(dataset.num_documents, shares, split)
        if dataset.corpus.tokens_before(end) - dataset.corpus.tokens_before(first) <= config.seq_length:
            return False
    return True


def _split_source(config: DataConfig, split: Split) -> tuple[tuple[str, ...], str, tuple[float, float, float]]:
    """What a split is read from: entries, the name of their setting, and shares in which only `split`'s matters."""
    shares = parse_split(config.split)
    if not config.valid:
        return config.train, "data.train", shares
    if split == "valid":
        return config.valid, "data.valid", (0.0, 1.0, 0.0)
    train, _, test = parse_split(f"{shares[0] + shares[1]},0,{shares[2]}")
    return config.train, "data.train", (train, 0.0, test)


def _open(
    blend: Sequence[BlendPart],
    *,
    split: Split,
    shares: tuple[float, float, float],
    seed: int,
    seq_length: int,
    vocab_size: int | None,
    shuffle: bool,
    masked_eod: int | None = None,
    document_boundaries: bool = False,
    reset_position_ids: bool = False,
) -> Dataset:
    weights = integer_weights([part.weight for part in blend])
    streams, parts = [], []
    for number, (part, weight) in enumerate(zip(blend, weights, strict=True)):
        dataset = IndexedDataset(part.prefix)
        key = stream_key(seed, split, number)
        stream = open_stream(dataset, seq_length=seq_length, shares=shares, split=split, key=key, shuffle=shuffle)
        first, end = document_range(dataset.num_documents, shares, split)
        streams.append(stream)
        parts.append(
            DatasetPart(
                prefix=dataset.prefix,
                share=weight / sum(weights),
                first_document=first,
                end_document=end,
                num_tokens=stream.num_tokens,
                num_samples=stream.num_samples,
            )
        )
    batcher = Batcher(
        streams,
        weights if len(weights) > 1 else None,
        seq_length=seq_length,
        vocab_size=vocab_size or 0,
        masked_eod=masked_eod,
        document_boundaries=document_boundaries,
        reset_position_ids=reset_position_ids,
    )
    return Dataset(parts, batcher, seq_length=seq_length)
