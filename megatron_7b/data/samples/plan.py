"""What a run takes from each set of its blend, computed with the schedule that training follows."""

from dataclasses import dataclass

from megatron_7b.data.samples.dataset import NumberedSamples


@dataclass(frozen=True, kw_only=True)
class SetPlan:
    """One set over a whole run."""

    prefix: str
    tokens: int
    """Of the split's documents, each counted once."""
    share: float
    """Of all samples, as long as no set has run out."""
    samples_per_epoch: int
    """Samples that begin in the first epoch."""
    samples: int
    """Samples that the run takes from it, those that it has already read in this pass included."""
    consumed: int
    """Of these, samples that were read before this blend began: 0 unless a resumed run has changed it."""
    epochs: float
    """How often each of its tokens is read, on average."""
    first_epoch_ends: int | None
    """Samples of all sets after which its first epoch is complete, at the earliest where this blend began; None if the
    run ends before."""
    max_samples: int | None
    """Samples that it can give (`data.max_epochs`); None is no limit."""
    runs_out: int | None
    """Samples of all sets after which it is exhausted; None if the run ends before."""


def plan_sets(dataset: NumberedSamples, num_samples: int) -> list[SetPlan]:
    """Count the first `num_samples` samples of a training set.

    Args:
        dataset: As an objective opened it.
        num_samples: Of the whole run.

    Raises:
        ConfigError: All sets run out before the end of the run.
    """
    dataset.check_end(num_samples)
    order = dataset.order
    blend, taken = order.blend(), order.consumed_at(num_samples)

    def number_after(set_number: int, count: int | None) -> int | None:
        """Return the samples of all sets after which one has given `count`, if the run comes to that."""
        if count is None or taken[set_number] < count:
            return None
        position = count - order.sets[set_number].consumed
        return order.first_sample + (blend.number_of(set_number, position - 1) + 1 if position > 0 else 0)

    return [
        SetPlan(
            prefix=part.prefix,
            tokens=part.num_tokens,
            share=part.share,
            samples_per_epoch=part.num_samples,
            samples=taken[number],
            consumed=order.sets[number].consumed,
            epochs=float(taken[number] / part.samples_per_epoch),
            first_epoch_ends=number_after(number, part.num_samples),
            max_samples=part.max_samples,
            runs_out=number_after(number, part.max_samples),
        )
        for number, part in enumerate(dataset.parts)
    ]
