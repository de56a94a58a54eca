"""Two evaluations beside one another, with a paired test where both have logged their questions."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_7b.errors import ConfigError
from megatron_7b.evaluation.harness.results import Measure, TaskResults
from megatron_7b.evaluation.report.items import Item, items_of
from megatron_7b.evaluation.report.statistics import PairedTest, paired_test


@dataclass(frozen=True)
class ComparedMeasure:
    """One figure of two evaluations.

    Attributes:
        first: Of the first.
        second: Of the second.
        test: Question by question; None if one of them has not logged its questions.
    """

    first: Measure
    second: Measure
    test: PairedTest | None


def compare_results(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[ComparedMeasure]:
    """Compare the figures that two evaluations have in common.

    Raises:
        ConfigError: They have none in common.
    """
    others = {one.path: one for one in TaskResults(second).measures()}
    pairs = [(one, others[one.path]) for one in TaskResults(first).measures() if one.path in others]
    if not pairs:
        names = [", ".join(sorted(one["results"])) for one in (first, second)]
        raise ConfigError(f"the evaluations have no task in common: {names[0]} and {names[1]}")
    items, other_items = _by_key(first), _by_key(second)
    return [ComparedMeasure(one, other, _test(one, other, items, other_items)) for one, other in pairs]


def is_mean(measure: Measure, values: Sequence[float]) -> bool:
    """Return whether a figure is the mean of values of single questions: of perplexities, say, it is not."""
    return bool(values) and math.isclose(sum(values) / len(values), measure.value, rel_tol=1e-6, abs_tol=1e-9)


def _by_key(content: Mapping[str, Any]) -> dict[tuple[str, str], Item]:
    return {(item.task, item.key): item for item in items_of(content)}


def _test(
    measure: Measure, other: Measure, items: Mapping[tuple[str, str], Item], others: Mapping[tuple[str, str], Item]
) -> PairedTest | None:
    title = measure.title
    keys = [key for key, item in items.items() if item.task == measure.task and title in item.values and key in others]
    first, second = ([of_one[key].values[title] for key in keys] for of_one in (items, others))
    return paired_test(first, second) if is_mean(measure, first) and is_mean(other, second) else None
