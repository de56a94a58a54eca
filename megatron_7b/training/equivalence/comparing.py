"""What two layouts have recorded, compared: losses, gradients and weights, step by step, rank by rank."""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from megatron_7b.training.equivalence.recording import Place, file_of

type What = Literal["initial weight", "loss", "gradient norm", "gradient", "weight"]


class Band(Protocol):
    """How far a layout may be from the reference."""

    @property
    def least_share(self) -> float:
        """Weights count where their gradient is at least this part of its parameter's root mean square.

        Elsewhere its sign may be that of rounding, and Adam's step has the size of the learning rate whatever the
        gradient's.
        """
        ...

    def of(self, step: int, what: What, name: str) -> float:
        """Return the bound of one figure; `name` is that of a parameter, or empty."""
        ...


@dataclass(frozen=True)
class FixedBand:
    """The same bounds at every step.

    Attributes:
        loss: Of a step.
        norm: Of all gradients of a step.
        gradient: Norm of the difference over the norm, for each parameter.
        weight: The same for weights after the update.
        least_share: Which weights count.
    """

    loss: float
    norm: float
    gradient: float
    weight: float
    least_share: float = 1e-2

    def of(self, step: int, what: What, name: str) -> float:  # noqa: ARG002 - part of the protocol
        """Return the bound of one kind of figure."""
        kinds = {"loss": self.loss, "gradient norm": self.norm, "gradient": self.gradient, "weight": self.weight}
        return 0.0 if what == "initial weight" else kinds[what]


FP32 = FixedBand(1e-5, 1e-4, 1e-4, 1e-4)
"""FP32 rounds at 2^-24, and a sum in another order of some thousand numbers is off by some hundred such roundings."""

TIMES_ITS_ERROR = 2.0
"""How many times the rounding error of the reference layout another layout may have.

Its roundings are others of the same size, so its distance from exact figures is that of the reference, give or take the
spread of a norm over many numbers; partial sums of tensor ranks are rounded once more before they are added.
"""

LEAST_OF_SINGLE_NUMBERS = 2.0**-12
"""Bound of a loss or norm that the reference happens to have almost exactly: BF16 rounds at 2^-9, and these are of more
than 64 numbers that were rounded apart, whose mean is off by an eighth of that."""


@dataclass(frozen=True)
class RoundingBand:
    """Bounds that follow from what one layout loses by rounding: its own distance from the same steps in FP32.

    Attributes:
        errors: That distance of each figure: by step, kind and parameter. Those of the loss and of the norm of all
            gradients are single numbers that can be right by chance: of each, the largest of all steps counts, and no
            bound is below `LEAST_OF_SINGLE_NUMBERS`.
        least_share: Which weights count; BF16 moves a gradient by some hundredths of its root mean square.
    """

    errors: Mapping[tuple[int, What, str], float]
    least_share: float = 0.25

    def of(self, step: int, what: What, name: str) -> float:
        """Return the bound of one figure; of initial weights, which are the same ones, none."""
        if what == "initial weight":
            return 0.0
        if name:
            return TIMES_ITS_ERROR * self.errors.get((step, what, name), 0.0)
        largest = max(error for (_, kind, _), error in self.errors.items() if kind == what)
        return max(TIMES_ITS_ERROR * largest, LEAST_OF_SINGLE_NUMBERS)


@dataclass(frozen=True)
class _NoBand:
    least_share: float = RoundingBand.least_share

    def of(self, step: int, what: What, name: str) -> float:  # noqa: ARG002
        return math.inf


@dataclass(frozen=True)
class Deviation:
    """One figure of a layout beside that of the reference.

    Attributes:
        step: From 1; 0: before the first.
        what: Kind of figure.
        name: Of the parameter; empty for figures of the whole model.
        distance: Relative.
        bound: Largest one that is within the band.
        rank: Of the layout, for a parameter: the one that has most of the difference.
    """

    step: int
    what: What
    name: str
    distance: float
    bound: float
    rank: int | None = None

    @property
    def share_of_bound(self) -> float:
        """How much of the bound the distance is; above 1 it is outside."""
        return _ratio(self.distance, self.bound)

    @property
    def is_outside(self) -> bool:
        """Whether it is more than rounding."""
        return not self.distance <= self.bound  # nor may it be no number

    def __str__(self) -> str:
        subject = f"{self.what} of {self.name} (rank {self.rank})" if self.name else self.what
        if math.isnan(self.distance):
            return f"step {self.step}: {subject} is not a number"
        return f"step {self.step}: {subject} is {self.distance:.1e} apart, more than {self.bound:.0e}"


@dataclass(frozen=True)
class Comparison:
    """A layout beside the reference.

    Attributes:
        steps: Recorded.
        largest: The largest deviation of each kind.
        nearest_to_bound: The deviation that takes most of its bound, of all but initial weights.
        first: The first one that is outside of the band: of the earliest step, in the order in which a step computes
            (loss, gradients from the last parameter to the first one, norm, weights); None: there is none.
        first_parameter: The first one outside that is of a parameter, of the same step if that has one.
        others: The farthest ones of parameters of that step and kind, the farthest first.
    """

    steps: int
    largest: dict[What, Deviation]
    nearest_to_bound: Deviation
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
    nearest = Deviation(0, "loss", "", 0.0, math.inf)
    first: Deviation | None = None
    first_parameter: Deviation | None = None
    others: list[Deviation] = []
    settled: dict[str, Any] = {}
    for step in range(num_steps + 1):
        found = list(_deviations(reference, other, step, reference_ranks, other_ranks, band, settled))
        for one in found:
            known = largest.get(one.what)
            if known is None or _is_above(one.distance, known.distance):
                largest[one.what] = one
            if one.what != "initial weight" and _is_above(one.share_of_bound, nearest.share_of_bound):
                nearest = one
        outside = [one for one in found if one.is_outside]
        first = first or next(iter(outside), None)
        of_parameters = [one for one in outside if one.name]
        if first_parameter is None and of_parameters:
            first_parameter = of_parameters[0]
            alike = [one for one in of_parameters if one.what == first_parameter.what]
            others = sorted(alike, key=lambda one: math.inf if math.isnan(one.distance) else one.distance)[:-6:-1]
    return Comparison(num_steps, largest, nearest, first, first_parameter, tuple(others))


def measure_rounding(exact: Path, rounded: Path, num_steps: int, *, num_ranks: int) -> RoundingBand:
    """Return the bounds for other layouts that follow from what one layout loses by rounding.

    Args:
        exact: What the layout has recorded in FP32, from rounded weights.
        rounded: What it has recorded in another number format.
        num_steps: Recorded in both.
        num_ranks: Of the layout.
    """
    settled: dict[str, Any] = {}
    errors: dict[tuple[int, What, str], float] = {}
    for step in range(1, num_steps + 1):
        for one in _deviations(exact, rounded, step, num_ranks, num_ranks, _NoBand(), settled):
            errors[step, one.what, one.name] = one.distance
    if any(".mlp.router." in name for _, _, name in errors):
        errors = _shared_by_layers(errors)
    return RoundingBand(errors)


def _shared_by_layers(errors: Mapping[tuple[int, What, str], float]) -> dict[tuple[int, What, str], float]:
    """Return the errors with the largest one of all layers and experts for each of their parameters.

    A token that two experts are equally good for goes to the one or the other by rounding, and moves the gradients of
    both, of the router and of what is around them by its own: where that happens is chance, how far it moves is not.
    """
    shared: dict[tuple[int, What, str], float] = {}

    def family(key: tuple[int, What, str]) -> tuple[int, What, str]:
        return key[0], key[1], re.sub(r"\.\d+\.", ".", key[2])

    for key, error in errors.items():
        shared[family(key)] = max(error, shared.get(family(key), 0.0))
    return {key: shared[family(key)] for key in errors}


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
        yield from _of_parameters(step, "initial weight", weights, actual, "weights", band, {})
        return
    yield Deviation(step, "loss", "", _apart(actual[0].loss, expected[0].loss), band.of(step, "loss", ""))
    # Gradients are computed from the last parameter to the first one.
    yield from reversed(list(_of_parameters(step, "gradient", gradients, actual, "gradients", band, {})))
    norms = _apart(actual[0].grad_norm, expected[0].grad_norm)
    yield Deviation(step, "gradient norm", "", norms, band.of(step, "gradient norm", ""))
    for name, gradient in gradients.items():
        counts = gradient.abs() >= band.least_share * gradient.square().mean().sqrt()
        settled[name] = counts & settled[name] if name in settled else counts
    yield from _of_parameters(step, "weight", weights, actual, "weights", band, settled)


def _read(folder: Path, step: int, rank: int) -> Any:
    import torch

    # Written by ourselves a moment ago.
    return torch.load(file_of(folder, step, rank), weights_only=False)


def _whole(records: list[Any], kind: str) -> dict[str, Any]:
    """Put the shards of the reference together, in the order of the forward pass."""
    import torch

    found: dict[str, Any] = {}
    for shard in sorted((one for record in records for one in getattr(record, kind)), key=lambda one: one.number):
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
    band: Band,
    settled: dict[str, Any],
) -> Iterator[Deviation]:
    """Yield how far each parameter is apart, in the order of the forward pass.

    The parts of a parameter count together, as rounding is spread over the whole of it and not in proportion to each
    part; of the ranks that hold the same part, the farthest one counts.
    """
    import torch

    parts: dict[str, dict[Place, _Part]] = {}
    unlike: dict[str, int] = {}
    for rank, record in enumerate(records):
        for shard in getattr(record, kind):
            expected = whole.get(shard.name)
            if expected is None or tuple(expected.shape) != tuple(shard.shape):
                unlike[shard.name] = rank
                continue
            difference = magnitude = 0.0
            for where, own in _pieces(shard):
                right, counts = expected[where], settled[shard.name][where] if shard.name in settled else True
                apart = torch.where(torch.as_tensor(counts), shard.value[own] - right, 0.0)
                difference += float(apart.double().square().sum())
                magnitude += float(right.double().square().sum())
            known = parts.setdefault(shard.name, {}).get(shard.place)
            if known is None or _is_above(difference, known.difference):
                parts[shard.name][shard.place] = _Part(difference, magnitude, rank)
    for name in [*whole, *(name for name in unlike if name not in whole)]:
        bound = band.of(step, what, name)
        held = [] if name in unlike else list(parts.get(name, {}).values())
        if not held:
            yield Deviation(step, what, name, math.inf, bound, unlike.get(name))
            continue
        distance = _ratio(math.sqrt(sum(one.difference for one in held)), math.sqrt(sum(one.magnitude for one in held)))
        farthest = max(held, key=lambda one: math.inf if math.isnan(one.difference) else one.difference)
        yield Deviation(step, what, name, distance, bound, farthest.rank)


@dataclass(frozen=True)
class _Part:
    """A part of a parameter, of the rank that has it farthest from the reference: sums of squares."""

    difference: float
    magnitude: float
    rank: int


def _is_above(one: float, other: float) -> bool:
    """Return whether a distance is the larger one; what is no number is above all numbers."""
    return not math.isnan(other) and not one <= other


def _apart(actual: float, expected: float) -> float:
    return _ratio(abs(actual - expected), abs(expected))


def _ratio(difference: float, magnitude: float) -> float:
    if difference == 0.0:
        return 0.0
    return difference / magnitude if magnitude else math.inf
