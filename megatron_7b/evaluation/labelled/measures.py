"""The measures of classic tasks: scikit-learn's and SciPy's for texts, seqeval's for names, SQuAD's for answers."""

import collections
import math
import re
import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class LabelMeasures:
    """How good predictions are.

    Attributes:
        values: Measures by name, each a number.
        report: A table for people; empty if there is none.
        count: Records.
    """

    values: dict[str, float]
    report: str
    count: int


def measure_classes(truth: Sequence[str], predicted: Sequence[str], names: Sequence[str]) -> LabelMeasures:
    """Compare a class of each text: accuracy, F1 over all texts and over classes, Matthews' correlation.

    With two classes also the F1 of the second one, as GLUE has it for MRPC and QQP.
    """
    from sklearn import metrics

    common: dict[str, Any] = {"labels": list(names), "zero_division": 0.0}
    values = {
        "accuracy": metrics.accuracy_score(truth, predicted),
        "macro_f1": metrics.f1_score(truth, predicted, average="macro", **common),
        "micro_f1": metrics.f1_score(truth, predicted, average="micro", **common),
        "mcc": metrics.matthews_corrcoef(truth, predicted),
    }
    if len(names) == 2:
        values["f1"] = metrics.f1_score(truth, predicted, pos_label=names[1], zero_division=0.0)
    report = metrics.classification_report(truth, predicted, digits=3, **common)
    return LabelMeasures(_numbers(values), report, len(truth))


def measure_several_classes(
    truth: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]], names: Sequence[str]
) -> LabelMeasures:
    """Compare any number of classes of each text; accuracy counts texts of which all are right."""
    from sklearn import metrics

    given, found = (np.array([[name in row for name in names] for row in rows]) for rows in (truth, predicted))
    values = {
        "accuracy": metrics.accuracy_score(given, found),
        "macro_f1": metrics.f1_score(given, found, average="macro", zero_division=0.0),
        "micro_f1": metrics.f1_score(given, found, average="micro", zero_division=0.0),
    }
    report = metrics.classification_report(given, found, target_names=list(names), digits=3, zero_division=0.0)
    return LabelMeasures(_numbers(values), report, len(truth))


def measure_numbers(truth: Sequence[Any], predicted: Sequence[Any]) -> LabelMeasures:
    """Compare numbers: their correlation, that of their ranks, and how far they are apart."""
    from scipy import stats

    given, found = (np.array(numbers, np.float64).reshape(len(truth), -1) for numbers in (truth, predicted))
    pairs = [(given[:, column], found[:, column]) for column in range(given.shape[1])]
    values = {
        "pearson": float(np.mean([_correlation(stats.pearsonr, *pair) for pair in pairs])),
        "spearman": float(np.mean([_correlation(stats.spearmanr, *pair) for pair in pairs])),
        "mean_absolute_error": float(np.abs(given - found).mean()),
        "root_mean_squared_error": float(np.sqrt(np.square(given - found).mean())),
    }
    return LabelMeasures(values, "", len(truth))


def measure_tags(truth: Sequence[list[str]], predicted: Sequence[list[str]], *, is_bio: bool) -> LabelMeasures:
    """Compare tags of words: with BIO precision, recall and F1 of whole names; otherwise as classes of words."""
    if not is_bio:
        given, found = ([tag for tags in rows for tag in tags] for rows in (truth, predicted))
        return measure_classes(given, found, sorted({*given, *found}))
    from seqeval import metrics

    values = {
        "accuracy": metrics.accuracy_score(truth, predicted),
        "precision": metrics.precision_score(truth, predicted, zero_division=0),
        "recall": metrics.recall_score(truth, predicted, zero_division=0),
        "f1": metrics.f1_score(truth, predicted, zero_division=0),
    }
    has_names = any(tag != "O" for rows in (truth, predicted) for tags in rows for tag in tags)
    report = metrics.classification_report(truth, predicted, digits=3, zero_division=0) if has_names else ""
    return LabelMeasures(_numbers(values), report, len(truth))


def measure_answers(truth: Sequence[Sequence[str]], predicted: Sequence[str]) -> LabelMeasures:
    """Compare answers in percent: the share that is one of the right ones, and the mean F1 of their words.

    Source: the evaluation of SQuAD 1.1 and 2.0. A question without an answer is answered by an empty text.
    """
    pairs = list(zip(map(_right, truth), predicted, strict=True))
    exact = [max(normalize_answer(one) == normalize_answer(found) for one in right) for right, found in pairs]
    f1 = [max(answer_f1(one, found) for one in right) for right, found in pairs]
    values = {"exact_match": 100 * float(np.mean(exact)), "f1": 100 * float(np.mean(f1))}
    without = [number for number, given in enumerate(truth) if not given]
    if without:
        values["no_answer_accuracy"] = 100 * float(np.mean([not predicted[number] for number in without]))
    return LabelMeasures(values, "", len(truth))


def _right(given: Sequence[str]) -> Sequence[str]:
    kept = [one for one in given if normalize_answer(one)]
    return kept or [""]


def normalize_answer(text: str) -> str:
    """Return a text in lower case without punctuation, articles and further spaces."""
    kept = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", kept).split())


def answer_f1(right: str, found: str) -> float:
    """Return the F1 of the words of an answer, in any order."""
    words, given = normalize_answer(found).split(), normalize_answer(right).split()
    if not words or not given:
        return float(words == given)
    shared = sum((collections.Counter(words) & collections.Counter(given)).values())
    return 2 * shared / (len(words) + len(given))


def _correlation(correlate: Any, given: np.ndarray, found: np.ndarray) -> float:
    if len(given) < 2 or np.ptp(given) == 0 or np.ptp(found) == 0:
        return math.nan  # one of them does not vary
    return float(correlate(given, found).statistic)


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in values.items()}
