"""Opening what a run reads: the training, validation and test share of its corpora, or one corpus from end to end."""

from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, Unpack

from megatron_7b.data._index import Batcher, FillInTheMiddle, TokenStream
from megatron_7b.data.samples.dataset import Dataset
from megatron_7b.data.samples.fill_in_the_middle import build_fill_in_the_middle
from megatron_7b.data.samples.sample_order import WINDOWS, Reached, SampleOrder
from megatron_7b.data.samples.sampling import open_stream, stream_key
from megatron_7b.data.samples.sets import UNKNOWN_CONTENTS, Source, find_sets, parts_of, whole_corpus
from megatron_7b.data.samples.split import Split
from megatron_7b.errors import ConfigError

if TYPE_CHECKING:
    from megatron_7b.config.schema import DataConfig

__all__ = ["UNKNOWN_CONTENTS", "open_sequential", "open_split"]


def open_split(
    config: "DataConfig",
    split: Split,
    *,
    seed: int,
    vocab_size: int | None = None,
    eod_id: int | None = None,
    fim_ids: tuple[int, int, int] | None = None,
    reads_per_window: int = 1,
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
        reads_per_window: Samples in a row of a set that hold the same window.
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
    source = find_sets(config, split)
    return _open(
        source,
        seed=seed,
        seq_length=config.seq_length,
        shuffle=True,
        reads_per_window=reads_per_window,
        contents=contents,
        reached=reached,
        vocab_size=vocab_size or 0,
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
    reads_per_window: int = 1,
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
        reads_per_window: As for `open_split`.

    Raises:
        DataFormatError: A file is damaged, or holds fewer than two tokens.
    """
    return _open(
        whole_corpus(prefix),
        seed=0,
        seq_length=seq_length,
        shuffle=False,
        reads_per_window=reads_per_window,
        vocab_size=vocab_size or 0,
        masked_eod=masked_eod,
        document_boundaries=document_boundaries,
        reset_position_ids=reset_position_ids,
    )


class _BatchOptions(TypedDict, total=False):
    """What the native batcher is told besides which streams it reads."""

    vocab_size: int
    masked_eod: int | None
    document_boundaries: bool
    reset_position_ids: bool
    fill_in_the_middle: FillInTheMiddle | None


def _open(
    source: Source,
    *,
    seed: int,
    seq_length: int,
    shuffle: bool,
    reads_per_window: int,
    contents: Mapping[str, str] = UNKNOWN_CONTENTS,
    reached: Reached | None = None,
    **options: Unpack[_BatchOptions],
) -> Dataset:
    kept = source.sets
    if source.may_leave_out:
        kept = tuple(one for one in kept if one.num_tokens > seq_length) or kept  # of none, the first one says why
    rates = [Fraction(one.num_tokens * reads_per_window, seq_length) for one in kept]
    cut = "" if reads_per_window == 1 else f"{WINDOWS}, each of {reads_per_window} samples"
    continuation = source.order(
        kept, rates, seq_length=seq_length, seed=seed, cut=cut, contents=contents, reached=reached
    )
    order = continuation.order
    streams = []
    for one, of_set in zip(kept, order.sets, strict=True):
        key = stream_key(seed, source.split, of_set.number, pass_begin=order.pass_begin)
        streams.append(
            open_stream(
                one.dataset, seq_length=seq_length, shares=source.shares, split=source.split, key=key, shuffle=shuffle
            )
        )
    counts = [stream.num_samples * reads_per_window for stream in streams]
    batcher = _build_batcher(streams, order, reads_per_window=reads_per_window, **options)
    return Dataset(parts_of(kept, order, counts, rates), batcher, continuation, left_out=source.left_out(kept))


class _Origin(TypedDict, total=False):
    first_sample: int
    consumed: list[int]


def _origin(order: SampleOrder) -> _Origin:
    """Return where a blend begins that takes over from an earlier one."""
    return {"first_sample": order.first_sample, "consumed": [one.consumed for one in order.sets]}


def _build_batcher(
    streams: Sequence[TokenStream], order: SampleOrder, *, reads_per_window: int, **options: Unpack[_BatchOptions]
) -> Batcher:
    weights = [one.weight for one in order.sets]
    remaining = [one.remaining for one in order.sets]
    return Batcher(
        streams,
        weights if len(weights) > 1 else None,
        None if all(limit is None for limit in remaining) else remaining,
        seq_length=order.seq_length,
        reads_per_window=reads_per_window,
        **({} if order.first_sample == 0 else _origin(order)),
        **options,
    )
