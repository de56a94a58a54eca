"""The corpora that a split is read from, and the order of their samples, however samples are cut."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from megatron_7b.config.blend import BlendPart
from megatron_7b.data.corpus.indexed_dataset import IndexedDataset
from megatron_7b.data.samples.blend import integer_weights, parse_blend
from megatron_7b.data.samples.dataset import DatasetPart
from megatron_7b.data.samples.sample_order import (
    Continuation,
    OnOrderChange,
    Reached,
    SampleOrder,
    SetOrder,
    continue_order,
)
from megatron_7b.data.samples.split import SPLITS, Split, document_range, parse_split
from megatron_7b.errors import ConfigError

if TYPE_CHECKING:
    from megatron_7b.config.schema import DataConfig

WHOLE = (1.0, 0.0, 0.0)
UNKNOWN_CONTENTS: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True, eq=False)
class OpenedSet:
    """A corpus of a blend, and the part of it that a split reads."""

    number: int
    dataset: IndexedDataset
    weight: int
    documents: tuple[int, int]
    num_tokens: int
    bound: Fraction
    """Epochs; 0 is no bound."""

    def in_order(self, samples_per_epoch: Fraction, contents: Mapping[str, str]) -> SetOrder:
        """Return it as the record of the order has it."""
        return SetOrder(
            prefix=str(Path(self.dataset.prefix).absolute()),
            number=self.number,
            weight=self.weight,
            first_document=self.documents[0],
            end_document=self.documents[1],
            num_tokens=self.num_tokens,
            content=contents.get(self.dataset.prefix, ""),
            max_samples=math.ceil(self.bound * samples_per_epoch) if self.bound else None,
        )


@dataclass(frozen=True, kw_only=True)
class Source:
    """The sets that a split is read from."""

    sets: tuple[OpenedSet, ...]
    split: Split
    shares: tuple[float, float, float]
    """Of train, valid and test; only that of `split` matters."""
    may_leave_out: bool
    """A set with too little text for one sample is left out; else it is an error, as a user has named it for this."""
    on_order_change: OnOrderChange = "refuse"

    def order(
        self,
        kept: Sequence[OpenedSet],
        samples_per_epoch: Sequence[Fraction],
        *,
        seq_length: int,
        seed: int,
        cut: str,
        contents: Mapping[str, str],
        reached: Reached | None,
    ) -> Continuation:
        """Return in which order the samples of the sets that are kept are read.

        Args:
            kept: Those of `sets` that have samples.
            samples_per_epoch: Of each of them.
            seq_length: Tokens of a sample.
            seed: The run's.
            cut: How samples are cut; see `SampleOrder`.
            contents: As for `open_split`.
            reached: As for `open_split`.

        Raises:
            ConfigError: The samples would not continue those of `reached`.
        """
        rows = [one.in_order(rate, contents) for one, rate in zip(kept, samples_per_epoch, strict=True)]
        wanted = SampleOrder(seq_length=seq_length, seed=seed, sets=tuple(rows), cut=cut)
        return continue_order(reached, wanted, self.on_order_change) if reached else Continuation(wanted)

    def left_out(self, kept: Sequence[OpenedSet]) -> list[str]:
        """Return the prefixes of the sets that are not kept."""
        return [one.dataset.prefix for one in self.sets if one not in kept]


def find_sets(config: "DataConfig", split: Split) -> Source:
    """Open the corpora of a split.

    Raises:
        ConfigError: The corpus, its weights or the split are malformed, or the split's share is 0.
        DataFormatError: A file is damaged.
    """
    entries, name, shares = _split_source(config, split)
    if shares[SPLITS.index(split)] == 0:
        raise ConfigError(
            f"data.split is {config.split!r}, which leaves no documents for {split!r}",
            hint="give it a share" + (", or name a corpus as data.valid" if split == "valid" else ""),
        )
    blend = parse_blend(entries, name=name)
    bounds = _bounds_per_set(config.max_epochs if split == "train" else (), len(blend))
    return Source(
        sets=_open_sets(blend, split=split, shares=shares, bounds=bounds),
        split=split,
        shares=shares,
        may_leave_out=not _is_read_whole(config, split),
        on_order_change=config.on_order_change,
    )


def whole_corpus(prefix: str | Path) -> Source:
    """Open a corpus from its first to its last document.

    Raises:
        DataFormatError: A file is damaged.
    """
    blend = (BlendPart(prefix=str(prefix), weight=Fraction(1)),)
    sets = _open_sets(blend, split="train", shares=WHOLE, bounds=[Fraction(0)])
    return Source(sets=sets, split="train", shares=WHOLE, may_leave_out=False)


def parts_of(
    kept: Sequence[OpenedSet], order: SampleOrder, num_samples: Sequence[int], samples_per_epoch: Sequence[Fraction]
) -> list[DatasetPart]:
    """Describe the sets that are kept, with the number of samples that begin in an epoch of each."""
    total_weight = sum(one.weight for one in order.sets)
    return [
        DatasetPart(
            prefix=one.dataset.prefix,
            share=of_set.weight / total_weight,
            first_document=of_set.first_document,
            end_document=of_set.end_document,
            num_tokens=of_set.num_tokens,
            num_samples=count,
            max_samples=of_set.max_samples,
            samples_per_epoch=rate,
        )
        for one, of_set, count, rate in zip(kept, order.sets, num_samples, samples_per_epoch, strict=True)
    ]


def _open_sets(
    blend: Sequence[BlendPart], *, split: Split, shares: tuple[float, float, float], bounds: Sequence[Fraction]
) -> tuple[OpenedSet, ...]:
    weights = integer_weights([part.weight for part in blend])
    opened = []
    for number, (part, weight, bound) in enumerate(zip(blend, weights, bounds, strict=True)):
        dataset = IndexedDataset(part.prefix)
        documents = document_range(dataset.num_documents, shares, split)
        opened.append(OpenedSet(number, dataset, weight, documents, _num_tokens(dataset, documents), bound))
    return tuple(opened)


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
