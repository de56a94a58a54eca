"""Opening what a run reads: the training, validation and test share of its corpora, or one corpus from end to end."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, TypedDict, Unpack

from megatron_7b.config.blend import BlendPart
from megatron_7b.data._index import Batcher, FillInTheMiddle, TokenStream
from megatron_7b.data.corpus.indexed_dataset import IndexedDataset
from megatron_7b.data.samples.blend import integer_weights, parse_blend
from megatron_7b.data.samples.dataset import Dataset, DatasetPart
from megatron_7b.data.samples.fill_in_the_middle import build_fill_in_the_middle
from megatron_7b.data.samples.sample_order import (
    Continuation,
    OnOrderChange,
    Reached,
    SampleOrder,
    SetOrder,
    continue_order,
)
from megatron_7b.data.samples.sampling import open_stream, stream_key
from megatron_7b.data.samples.split import SPLITS, Split, document_range, parse_split
from megatron_7b.errors import ConfigError

if TYPE_CHECKING:
    from megatron_7b.config.schema import DataConfig

WHOLE = (1.0, 0.0, 0.0)
UNKNOWN_CONTENTS: Mapping[str, str] = MappingProxyType({})


def open_split(
    config: "DataConfig",
    split: Split,
    *,
    seed: int,
    vocab_size: int | None = None,
    eod_id: int | None = None,
    fim_ids: tuple[int, int, int] | None = None,
    contents: Mapping[str, str] = UNKNOWN_CONTENTS,
    reached: Reached | None = None,
) -> Dataset:
    """Return the shuffled, endless samples of one split.

    `train` and `test` are shares of `config.train`, and so is `valid` unless `config.valid` names a corpus, which is
    then read whole (and training gets the validation's share as well). Sets of `config.train` with too little text for
    one sample of `valid` or `test` are left out of it; the others keep the proportion of their weights.

    Args:
        config: The data section.
        split: Which one.
        seed: The run's seed; determines the order, for each split its own.
        vocab_size: True vocabulary size that ids are checked against while batches are assembled; None: unchecked.
        eod_id: End-of-document token, for `config.eod_mask_loss`; `config.fim_rate` leaves it where it is.
        fim_ids: Tokens that announce prefix, middle and suffix, for `config.fim_rate`; see `find_fim_ids`.
        contents: `CorpusSpots.fingerprint` of each set by its prefix, for the record of the order.
        reached: What a resumed run has read of `train`; None for a fresh one.

    Raises:
        ConfigError: The corpus, its weights or the split are malformed, the split's share is 0, an id is missing, or
            the samples would not continue those of `reached`.
        DataFormatError: A file is damaged, or the split of a set, or of all its sets, is smaller than one sample.

    Collective: none.
    """
    if config.eod_mask_loss and eod_id is None:
        raise ConfigError(
            "data.eod_mask_loss is set, but the tokenizer has no end-of-document token",
            hint="use a tokenizer with one, or leave data.eod_mask_loss off",
        )
    fill_in_the_middle = None
    if config.fim_rate > 0 and split == "train":
        fill_in_the_middle = build_fill_in_the_middle(config, fim_ids, eod_id=eod_id, seed=seed)
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
        vocab_size=vocab_size or 0,
        shuffle=True,
        max_epochs=config.max_epochs if split == "train" else (),
        leave_out=not _is_read_whole(config, split),
        contents=contents,
        reached=reached,
        on_order_change=config.on_order_change,
        masked_eod=eod_id if config.eod_mask_loss else None,
        document_boundaries=config.reset_attention_mask,
        reset_position_ids=config.reset_position_ids,
        fill_in_the_middle=fill_in_the_middle,
    )


def open_sequential(
    prefix: str | Path,
    *,
    seq_length: int,
    vocab_size: int | None = None,
    masked_eod: int | None = None,
    document_boundaries: bool = False,
    reset_position_ids: bool = False,
) -> Dataset:
    """Return a whole corpus, read once in the order of the file: for evaluation.

    Samples 0 to num_samples - 1 predict every token but the first exactly once; in the last one, and in all samples
    after it, what comes after the corpus's end is token 0 with loss mask 0.

    Args:
        prefix: The corpus.
        seq_length: Input tokens per sample.
        vocab_size: As for `open_split`.
        masked_eod: Token after which the prediction is left out of the loss; None: none.
        document_boundaries: Have batches say where documents begin, so that they are kept apart.
        reset_position_ids: Count positions from the beginning of each document.

    Raises:
        DataFormatError: A file is damaged, or holds fewer than two tokens.
    """
    return _open(
        (BlendPart(prefix=str(prefix), weight=Fraction(1)),),
        split="train",
        shares=WHOLE,
        seed=0,
        seq_length=seq_length,
        vocab_size=vocab_size or 0,
        shuffle=False,
        masked_eod=masked_eod,
        document_boundaries=document_boundaries,
        reset_position_ids=reset_position_ids,
    )


def has_split(config: "DataConfig", split: Split, *, window_length: int | None = None) -> bool:
    """Return whether a split holds any sample. A corpus of few documents may have no validation share.

    Args:
        config: The data section.
        split: Which one.
        window_length: Tokens of text that a sample is made of; None: `config.seq_length`.

    Raises:
        ConfigError: The corpus, its weights or the split are malformed.
        DataFormatError: A file is damaged.
    """
    entries, name, shares = _split_source(config, split)
    if not entries or shares[SPLITS.index(split)] == 0:
        return False
    if _is_read_whole(config, split):
        return True
    needed = config.seq_length if window_length is None else window_length
    for part in parse_blend(entries, name=name):
        dataset = IndexedDataset(part.prefix)
        if _num_tokens(dataset, document_range(dataset.num_documents, shares, split)) > needed:
            return True
    return False


def _is_read_whole(config: "DataConfig", split: Split) -> bool:
    """Return whether a user has named these sets for just this purpose, so that each must have something to give."""
    return split == "train" or (split == "valid" and bool(config.valid))


def _num_tokens(dataset: IndexedDataset, documents: tuple[int, int]) -> int:
    first, end = documents
    return dataset.corpus.tokens_before(end) - dataset.corpus.tokens_before(first)


def _split_source(config: "DataConfig", split: Split) -> tuple[tuple[str, ...], str, tuple[float, float, float]]:
    """Return what a split is read from: entries, their setting's name, and shares of which only `split`'s matters."""
    shares = parse_split(config.split)
    if not config.valid:
        return config.train, "data.train", shares
    if split == "valid":
        return config.valid, "data.valid", (0.0, 1.0, 0.0)
    train, _, test = parse_split(f"{shares[0] + shares[1]},0,{shares[2]}")
    return config.train, "data.train", (train, 0.0, test)


class _BatchOptions(TypedDict, total=False):
    """What the native batcher is told besides which streams it reads."""

    vocab_size: int
    masked_eod: int | None
    document_boundaries: bool
    reset_position_ids: bool
    fill_in_the_middle: FillInTheMiddle | None


def _open(
    blend: Sequence[BlendPart],
    *,
    split: Split,
    shares: tuple[float, float, float],
    seed: int,
    seq_length: int,
    shuffle: bool,
    max_epochs: Sequence[float] = (),
    leave_out: bool = False,
    contents: Mapping[str, str] = UNKNOWN_CONTENTS,
    reached: Reached | None = None,
    on_order_change: OnOrderChange = "refuse",
    **options: Unpack[_BatchOptions],
) -> Dataset:
    opened = _open_sets(blend, split=split, shares=shares, bounds=_bounds_per_set(max_epochs, len(blend)))
    kept = [one for one in opened if one.num_tokens > seq_length] if leave_out else opened
    kept = kept or opened  # Where nothing is left, the first set's own message says why.
    wanted = SampleOrder(
        seq_length=seq_length, seed=seed, sets=tuple(one.in_order(seq_length, contents) for one in kept)
    )
    continuation = continue_order(reached, wanted, on_order_change) if reached else Continuation(wanted)
    order = continuation.order
    streams, parts = [], []
    total_weight = sum(one.weight for one in order.sets)
    for one, of_set in zip(kept, order.sets, strict=True):
        key = stream_key(seed, split, of_set.number, pass_begin=order.pass_begin)
        stream = open_stream(one.dataset, seq_length=seq_length, shares=shares, split=split, key=key, shuffle=shuffle)
        streams.append(stream)
        parts.append(
            DatasetPart(
                prefix=one.dataset.prefix,
                share=of_set.weight / total_weight,
                first_document=of_set.first_document,
                end_document=of_set.end_document,
                num_tokens=stream.num_tokens,
                num_samples=stream.num_samples,
                max_samples=of_set.max_samples,
            )
        )
    batcher = _build_batcher(streams, order, **options)
    left_out = [one.dataset.prefix for one in opened if one not in kept]
    return Dataset(parts, batcher, continuation, left_out=left_out)


@dataclass(frozen=True, eq=False)
class _OpenedSet:
    """A corpus of a blend, and the part of it that a split reads."""

    number: int
    dataset: IndexedDataset
    weight: int
    documents: tuple[int, int]
    num_tokens: int
    bound: Fraction
    """Epochs; 0 is no bound."""

    def in_order(self, seq_length: int, contents: Mapping[str, str]) -> SetOrder:
        """Return it as the record of the order has it."""
        return SetOrder(
            prefix=str(Path(self.dataset.prefix).absolute()),
            number=self.number,
            weight=self.weight,
            first_document=self.documents[0],
            end_document=self.documents[1],
            num_tokens=self.num_tokens,
            content=contents.get(self.dataset.prefix, ""),
            max_samples=math.ceil(self.bound * self.num_tokens / seq_length) if self.bound else None,
        )


def _open_sets(
    blend: Sequence[BlendPart], *, split: Split, shares: tuple[float, float, float], bounds: Sequence[Fraction]
) -> list[_OpenedSet]:
    weights = integer_weights([part.weight for part in blend])
    opened = []
    for number, (part, weight, bound) in enumerate(zip(blend, weights, bounds, strict=True)):
        dataset = IndexedDataset(part.prefix)
        documents = document_range(dataset.num_documents, shares, split)
        opened.append(_OpenedSet(number, dataset, weight, documents, _num_tokens(dataset, documents), bound))
    return opened


class _Origin(TypedDict, total=False):
    first_sample: int
    consumed: list[int]


def _origin(order: SampleOrder) -> _Origin:
    """Return where a blend begins that takes over from an earlier one."""
    return {"first_sample": order.first_sample, "consumed": [one.consumed for one in order.sets]}


def _build_batcher(streams: Sequence[TokenStream], order: SampleOrder, **options: Unpack[_BatchOptions]) -> Batcher:
    weights = [one.weight for one in order.sets]
    remaining = [one.remaining for one in order.sets]
    return Batcher(
        streams,
        weights if len(weights) > 1 else None,
        None if all(limit is None for limit in remaining) else remaining,
        seq_length=order.seq_length,
        **({} if order.first_sample == 0 else _origin(order)),
        **options,
    )


def _bounds_per_set(max_epochs: Sequence[float], num_sets: int) -> list[Fraction]:
    """Return the most epochs of each set, 0 for no bound; exactly the decimal number that was written.

    Raises:
        ConfigError: There are neither as many bounds as sets, nor one for all.
    """
    bounds = [Fraction(str(bound)) for bound in max_epochs] or [Fraction(0)]
    if len(bounds) not in (1, num_sets) or min(bounds) < 0:
        raise ConfigError(
            f"data.max_epochs is {list(max_epochs)}, expected one number for all {num_sets} sets, or one for each",
            hint="0 leaves a set without a bound",
        )
    return bounds if len(bounds) == num_sets else bounds * num_sets
