"""What a run will take from each set of its blend: counted by the schedule that training itself follows."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_7b.data._index import Blend
from megatron_7b.data.blend import integer_weights, parse_blend
from megatron_7b.data.dataset import Dataset


@dataclass(frozen=True, kw_only=True)
class SetPlan:
    """One set over a whole run."""

    prefix: str
    tokens: int
    """Of the split's documents, each counted once."""
    share: float
    """Of all samples."""
    samples_per_epoch: int
    """Samples that begin in the first epoch."""
    samples: int
    """That the run takes from it."""
    epochs: float
    """How often each of its tokens is read, on average."""
    first_epoch_ends: int | None
    """After so many samples of all sets the first epoch has been read; None where the run ends before."""


def plan_sets(dataset: Dataset, entries: Sequence[str], num_samples: int) -> list[SetPlan]:
    """Count the first `num_samples` samples of a training set.

    Args:
        dataset: As `open_split` made it.
        entries: The blend that it was made of, such as `config.data.train`.
        num_samples: Of the whole run.
    """
    weights = integer_weights([part.weight for part in parse_blend(entries)])
    blend = Blend(weights)
    taken = [int(count) for count in blend.counts(num_samples)]
    return [
        SetPlan(
            prefix=part.prefix,
            tokens=part.num_tokens,
            share=part.share,
            samples_per_epoch=part.num_samples,
            samples=taken[number],
            epochs=taken[number] * dataset.seq_length / part.num_tokens,
            first_epoch_ends=(
                _find_count(blend, weights, number, part.num_samples) if taken[number] >= part.num_samples else None
            ),
        )
        for number, part in enumerate(dataset.parts)
    ]


def _find_count(blend: Blend, weights: Sequence[int], number: int, wanted: int) -> int:
    """The first n such that n samples hold `wanted` of a set.

    After n samples a set of weight w among W has given floor(n w / W) or one more: only a few n are in question.
    """
    total, weight = sum(weights), weights[number]
    too_few = (wanted - 1) * total // weight
    enough = -(-wanted * total // weight)
    candidates = range(too_few, enough + 1)
    return candidates[bisect_left(candidates, wanted, key=lambda n: int(blend.counts(n)[number]))]
