"""What figures of an evaluation are worth: intervals, paired tests, calibration."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_RESAMPLES = 2000
_SEED = 1234
_NUM_BINS = 10


def interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Return where the mean lies with this confidence, by resampling the questions; a point for a single one."""
    from scipy import stats

    array = np.asarray(values, np.float64)
    if len(array) < 2 or np.ptp(array) == 0:
        return float(array.mean()), float(array.mean())
    found = stats.bootstrap(
        (array,), np.mean, n_resamples=_RESAMPLES, confidence_level=confidence, method="percentile", rng=_SEED
    ).confidence_interval
    return float(found.low), float(found.high)


@dataclass(frozen=True)
class PairedTest:
    """Two models on the same questions.

    Attributes:
        num_items: Questions that both answered.
        difference: Mean of the second less that of the first.
        interval: Where it lies with 95 % confidence.
        p_value: How often a difference as large comes by chance if the models are equally good.
        better: Questions on which the second is better.
        worse: Questions on which the first is.
    """

    num_items: int
    difference: float
    interval: tuple[float, float]
    p_value: float
    better: int
    worse: int


def paired_test(first: Sequence[float], second: Sequence[float]) -> PairedTest:
    """Compare two models question by question.

    Right and wrong are compared by the exact test on the questions on which the models differ (McNemar's); other
    values by exchanging the models at random.
    """
    from scipy import stats

    one, other = np.asarray(first, np.float64), np.asarray(second, np.float64)
    differences = other - one
    better, worse = int((differences > 0).sum()), int((differences < 0).sum())
    if better + worse == 0:
        p_value = 1.0
    elif set(np.unique(np.concatenate((one, other))).tolist()) <= {0.0, 1.0}:
        p_value = float(stats.binomtest(better, better + worse).pvalue)
    else:
        p_value = float(
            stats.permutation_test(
                (differences,), np.mean, permutation_type="samples", n_resamples=_RESAMPLES, rng=_SEED
            ).pvalue
        )
    return PairedTest(len(one), float(differences.mean()), interval(differences.tolist()), p_value, better, worse)


@dataclass(frozen=True)
class Bin:
    """Answers that a model is about as sure of.

    Attributes:
        low: Least share that the chosen answer has of all.
        high: The most.
        count: Questions.
        confidence: Mean share.
        accuracy: How many of these answers are right.
    """

    low: float
    high: float
    count: int
    confidence: float
    accuracy: float


def calibration(shares: Sequence[float], is_right: Sequence[bool]) -> tuple[list[Bin], float]:
    """Return bins of confidence that hold answers, and the expected calibration error.

    Args:
        shares: Of the chosen answers, 0 to 1.
        is_right: Whether they are right.
    """
    confidence, right = np.asarray(shares, np.float64), np.asarray(is_right, np.float64)
    places: NDArray[np.int64] = np.minimum((confidence * _NUM_BINS).astype(np.int64), _NUM_BINS - 1)
    bins = []
    for place in range(_NUM_BINS):
        inside = places == place
        if inside.any():
            mean, accuracy = float(confidence[inside].mean()), float(right[inside].mean())
            bins.append(Bin(place / _NUM_BINS, (place + 1) / _NUM_BINS, int(inside.sum()), mean, accuracy))
    error = sum(one.count * abs(one.accuracy - one.confidence) for one in bins) / max(1, len(confidence))
    return bins, error


def confusion(targets: Sequence[int], chosen: Sequence[int], num_answers: int) -> NDArray[np.int64]:
    """Count answers, [right answer, chosen answer]."""
    counts = np.zeros((num_answers, num_answers), np.int64)
    np.add.at(counts, (np.asarray(targets, np.int64), np.asarray(chosen, np.int64)), 1)
    return counts
