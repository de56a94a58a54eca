"""What two layouts have recorded, compared: losses, gradients and weights, step by step, rank by rank."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

type What = Literal["initial weight", "loss", "gradient norm", "gradient", "weight"]

_LEAST_SHARE = 1e-2
"""Weights count where the gradient is at least this part of its parameter's mean: elsewhere it is rounding, and Adam's
step has the size of the learning rate whatever the gradient's."""


@dataclass(frozen=True)
class Band:
    """How far two layouts may be apart, relatively, in one number format.

    Attributes:
        loss: Of a step.
        norm: Of all gradients of a step.
        gradient: Norm of the difference over the norm, for each parameter.
        weight: The same for weights after the update.
    """

    loss: float
    norm: float
    gradient: float
    weight: float

    def of(self, what: What) -> float:
        """Return the bound of one kind of figure."""
        kinds = {"loss": self.loss, "gradient norm": self.norm, "gradient": self.gradient, "weight": self.weight}
        return 0.0 if what == "initial weight" else kinds[what]


BANDS = {"fp32": Band(1e-5, 1e-4, 1e-4, 1e-4), "bf16": Band(2.0**-8, 2.0**-5, 2.0**-4, 2.0**-6)}
"""FP32 rounds at 2^-24, and a sum in another order of some thousand numbers is off by some hundred such roundings;
BF16 rounds at 2^-9, of which a gradient collects several."""


@dataclass(frozen=True)
class Deviation:
    """One figure of a layout beside that of the reference.

    Attributes:
        step: From 1; 0: before the first.
        what: Kind of figure.
        name: Of the parameter; empty for figures of the whole model.
        distance: Relative.
        bound: Largest one that is within the band.
        rank: Of the layout, for a parameter.
    """

    step: int
    what: What
    name: str
    distance: float
    bound: float
    rank: int | None = None

    @property
    def is_outside(self) -> bool:
        """Whether it is more than rounding."""
        return not self.distance <= self.bound  # nor may it be no number

    def __str__(self) -> str:
        subject = f"{self.what} of {self.name} (rank {self.rank})" if self.name else self.what
        return f"step {self.step}: {subject} is {self.distance:.1e} apart, more than {self.bound:.0e}"


@dataclass(frozen=True)
class Comparison:
    """A layout beside the reference.

    Attributes:
        steps: Recorded.
        largest: The largest deviation of each kind.
        first: The first one that is outside of the band: of the earliest step, in the order in which a step computes
            (loss, gradients from the last parameter to the first one, norm, weights); None: there is none.
        first_parameter: The first one outside that is of a parameter, of the same step if that has one.
        others: The farthest ones of parameters of that step and kind, the farthest first.
    """

    steps: int
    largest: dict[What, Deviation]
    first: Deviation | None
    first_parameter: Deviation | None
    others: tuple[Deviation, ...]

    @property
    def agrees(self) -> bool:
        """Whether all is within the band."""
        return self.first is None


def compare_recordings(
    reference: Path, other: Path, num_steps: int, *, reference_ranks: int, other_ranks: int, band: Band
) -> Comparison:
    """Compare what `record_steps` has written at two layouts.

    Args:
        reference: Folder of the layout to compare with.
        other: Folder of the other one.
        num_steps: Recorded at both.
        reference_ranks: Ranks of the first.
        other_ranks: Ranks of the second.
        band: What is taken for rounding.
    """
    largest: dict[What, Deviation] = {}
    first: Deviation | None = None
    first_parameter: Deviation | None = None
    others: list[Deviation] = []
    settled: dict[str, Any] = {}
    for step in range(num_steps + 1):
        found = list(_deviations(reference, other, step, reference_ranks, other_ranks, band, settled))
        for one in found:
            known = largest.get(one.what)
            if known is None or not one.distance <= known.distance:
                largest[one.what] = one
        outside = [one for one in found if one.is_outside]
        first = first or next(iter(outside), None)
        of_parameters = [one for one in outside if one.name]
        if first_parameter is None and of_parameters:
            first_parameter = of_parameters[0]
            alike = [one for one in of_parameters if one.what == first_parameter.what]
            others = sorted(alike, key=lambda one: math.inf if math.isnan(one.distance) else one.distance)[:-6:-1]
    return Comparison(num_steps, largest, first, first_parameter, tuple(others))


def _deviations(
    reference: Path, other: Path, step: int, reference_ranks: int, other_ranks: int, band: Band, settled: dict[str, Any]
) -> Iterator[Deviation]:
    """Yield all deviations of a step, in the order in which it computes.

    `settled` has, by parameter, where its gradients have been more than rounding in all steps so far; it is kept up to
    date.
    """
    expected = [_read(reference, step, rank) for rank in range(reference_ranks)]
    actual = [_read(other, step, rank) for rank in range(other_ranks)]
    gradients, weights = _whole(expected, "gradients"), _whole(expected, "weights")
    if step == 0:
        yield from _of_parameters(step, "initial weight", weights, actual, "weights", 0.0, {})
        return
    yield Deviation(step, "loss", "", _apart(actual[0].loss, expected[0].loss), band.loss)
    # Gradients are computed from the last parameter to the first one.
    yield from reversed(list(_of_parameters(step, "gradient", gradients, actual, "gradients", band.gradient, {})))
    norms = _apart(actual[0].grad_norm, expected[0].grad_norm)
    yield Deviation(step, "gradient norm", "", norms, band.norm)
    for name, gradient in gradients.items():
        counts = gradient.abs() >= _LEAST_SHARE * gradient.square().mean().sqrt()
        settled[name] = counts & settled[name] if name in settled else counts
    yield from _of_parameters(step, "weight", weights, actual, "weights", band.weight, settled)


def _read(folder: Path, step: int, rank: int) -> Any:
    import torch

    from megatron_7b.training.equivalence.recording import file_of

    # Written by ourselves a moment ago.
    return torch.load(file_of(folder, step, rank), weights_only=False)


def _whole(records: list[Any], kind: str) -> dict[str, Any]:
    """Put the shards of the reference together, in the order of the model."""
    import torch

    found: dict[str, Any] = {}
    for record in records:
        for shard in getattr(record, kind):
            whole = found.setdefault(shard.name, torch.full(shard.shape, math.nan))
            _write(whole, shard)
    return found


def _pieces(shard: Any) -> Iterator[tuple[Any, Any]]:
    """Yield where the pieces of a shard are in the whole, and in the shard."""
    rows, columns = shard.place
    across = slice(None) if columns is None else slice(*columns)
    done = 0
    for first, last in rows:
        where = (slice(first, last), across) if len(shard.shape) > 1 else (slice(first, last),)
        yield where, slice(done, done + last - first)
        done += last - first


def _write(whole: Any, shard: Any) -> None:
    for where, own in _pieces(shard):
        whole[where] = shard.value[own]


def _of_parameters(
    step: int,
    what: What,
    whole: dict[str, Any],
    records: list[Any],
    kind: str,
    bound: float,
    settled: dict[str, Any],
) -> Iterator[Deviation]:
    """Yield the largest deviation of each parameter over the ranks that hold it, in the order of the model."""
    import torch

    worst: dict[str, Deviation] = {}
    for rank, record in enumerate(records):
        for shard in getattr(record, kind):
            expected = whole.get(shard.name)
            if expected is None or tuple(expected.shape) != tuple(shard.shape):
                worst[shard.name] = Deviation(step, what, shard.name, math.inf, bound, rank)
                continue
            difference = magnitude = 0.0
            for where, own in _pieces(shard):
                right, counts = expected[where], settled[shard.name][where] if shard.name in settled else True
                apart = torch.where(torch.as_tensor(counts), shard.value[own] - right, 0.0)
                difference += float(apart.double().square().sum())
                magnitude += float(right.double().square().sum())
            distance = _ratio(math.sqrt(difference), math.sqrt(magnitude))
            known = worst.get(shard.name)
            if known is None or not distance <= known.distance:
                worst[shard.name] = Deviation(step, what, shard.name, distance, bound, rank)
    missing = {name: Deviation(step, what, name, math.inf, bound) for name in whole if name not in worst}
    both = worst | missing
    yield from (both[name] for name in [*whole, *(name for name in worst if name not in whole)])


def _apart(actual: float, expected: float) -> float:
    return _ratio(abs(actual - expected), abs(expected))


def _ratio(difference: float, magnitude: float) -> float:
    if difference == 0.0:
        return 0.0
    return difference / magnitude if magnitude else math.inf
