"""The measures of classic tasks against values worked out by hand."""

import math

import numpy as np
import pytest

from megatron_7b.evaluation.labelled.measures import (
    measure_answers,
    measure_classes,
    measure_numbers,
    measure_several_classes,
    measure_tags,
)


def test_classes() -> None:
    found = measure_classes(["a", "a", "b", "c"], ["a", "b", "b", "a"], ["a", "b", "c"])
    assert found.values["accuracy"] == found.values["micro_f1"] == 0.5
    assert found.values["macro_f1"] == pytest.approx((1 / 2 + 2 / 3 + 0) / 3)
    assert found.values["mcc"] == pytest.approx((2 * 4 - (2 * 2 + 1 * 2 + 1 * 0)) / math.sqrt((16 - 8) * (16 - 6)))
    assert "macro avg" in found.report


def test_several_classes() -> None:
    found = measure_several_classes([["a"], ["a", "b"], []], [["a"], ["a"], ["b"]], ["a", "b"])
    assert found.values == pytest.approx({"accuracy": 1 / 3, "micro_f1": 2 * 2 / (3 + 3), "macro_f1": 0.5})


def test_numbers() -> None:
    found = measure_numbers([0.0, 1.0, 2.0], [0.0, 2.0, 8.0])
    assert found.values["spearman"] == pytest.approx(1.0)
    assert found.values["pearson"] == pytest.approx(8 / math.sqrt(2 * (68 - 100 / 3)))
    assert found.values["mean_absolute_error"] == pytest.approx(7 / 3)
    assert math.isnan(measure_numbers([0.0, 1.0], [1.0, 1.0]).values["pearson"])


def test_names_count_only_as_a_whole() -> None:
    truth = [["B-PER", "I-PER", "O", "B-LOC"], ["O", "B-LOC"]]
    found = measure_tags(truth, [["B-PER", "O", "O", "B-LOC"], ["O", "B-LOC"]], is_bio=True)
    assert found.values == pytest.approx({"accuracy": 5 / 6, "precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3})
    assert measure_tags([["O"]], [["O"]], is_bio=True).values["f1"] == 0.0
    assert measure_tags([["N", "V"]], [["N", "N"]], is_bio=False).values["accuracy"] == 0.5


def test_answers_as_squad_counts_them() -> None:
    """Without articles, punctuation and case; the best of several right answers; nothing where there is none."""
    truth = [["the Eiffel Tower", "Paris"], ["in 1889"], []]
    found = measure_answers(truth, ["Eiffel tower!", "1889, they say", ""])
    assert found.values == pytest.approx(
        {"exact_match": 200 / 3, "f1": 100 * (1 + 2 * 1 / (3 + 2) + 1) / 3, "no_answer_accuracy": 100.0}
    )


def test_glue_has_the_figures_of_the_libraries() -> None:
    """Planted predictions: Matthews for CoLA, accuracy for SST-2 and MNLI, F1 for MRPC and QQP, correlation for STS-B.

    The F1 of a task with two classes is that of the second, as in GLUE.
    """
    from scipy import stats
    from sklearn import metrics

    random = np.random.default_rng(7)
    for names in (["0", "1"], ["entailment", "neutral", "contradiction"]):
        truth = random.choice(names, 300).tolist()
        predicted = [one if random.random() < 0.7 else str(random.choice(names)) for one in truth]
        found = measure_classes(truth, predicted, names)
        assert found.values == pytest.approx(
            {
                "accuracy": metrics.accuracy_score(truth, predicted),
                "macro_f1": metrics.f1_score(truth, predicted, average="macro"),
                "micro_f1": metrics.f1_score(truth, predicted, average="micro"),
                "mcc": metrics.matthews_corrcoef(truth, predicted),
                **({"f1": metrics.f1_score(truth, predicted, pos_label="1")} if len(names) == 2 else {}),
            }
        )
    given = random.uniform(0, 5, 200)
    guessed = given + random.normal(0, 1, 200)
    found = measure_numbers(given.tolist(), [[one] for one in guessed])
    assert found.values["pearson"] == pytest.approx(stats.pearsonr(given, guessed).statistic)
    assert found.values["spearman"] == pytest.approx(stats.spearmanr(given, guessed).statistic)
