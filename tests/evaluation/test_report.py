"""What people look at after an evaluation: intervals, paired tests, calibration, and pages that are safe to open."""

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_7b.errors import ConfigError
from megatron_7b.evaluation.report import compare_results, render_results
from megatron_7b.evaluation.report.items import items_of
from megatron_7b.evaluation.report.statistics import calibration, confusion, interval, paired_test
from tests.support.commands import run_command

ANSWERS = ("yes", "no <b>")


def evaluation(rights: list[bool], *, with_samples: bool = True) -> dict[str, Any]:
    """An evaluation as the harness logs it: a choice of two answers per question, and one text."""
    samples: dict[str, Any] = {"choice": [], "texts": []}
    for number, is_right in enumerate(rights):
        target = number % 2
        scores = [-1.0 - number * 0.1, -1.0 - number * 0.1]
        scores[target if is_right else 1 - target] += 0.5
        samples["choice"].append(
            {
                "doc_id": number, "doc_hash": f"h{number}", "target": target, "filter": "none", "metrics": ["acc"],
                "arguments": [[f"<script>question {number}</script>", answer] for answer in ANSWERS],
                "resps": [[[score, False]] for score in scores], "acc": float(is_right),
            }
        )  # fmt: skip
        for picked in ("strict", "loose"):
            samples["texts"].append(
                {
                    "doc_id": number, "doc_hash": f"t{number}", "target": "4", "filter": picked, "metrics": ["exact"],
                    "arguments": [["2 + 2 =", {"until": ["\n"]}]], "resps": [["five"]],
                    "exact": float(picked == "loose"),
                }
            )  # fmt: skip
    mean = sum(rights) / len(rights)
    results: dict[str, Any] = {
        "choice": {"alias": "choice", "acc,none": mean, "acc_stderr,none": 0.1},
        "texts": {"exact,strict": 0.0, "exact_stderr,strict": "N/A", "exact,loose": 1.0},
    }
    whole = {"results": results, "n-shot": {"choice": 2}, "versions": {"choice": 1}, "lm_eval_version": "0"}
    return {**whole, "samples": samples} if with_samples else whole


def test_figures_of_questions_come_back() -> None:
    items = list(items_of(evaluation([True, False, True])))
    assert [(item.chosen, item.target) for item in items[:3]] == [(0, 0), (0, 1), (0, 0)]
    assert items[0].shares == pytest.approx((0.62246, 0.37754), abs=1e-5)
    assert items[1].loss == pytest.approx(-np.log(0.37754), abs=1e-4)
    assert items[3].values == {"exact (strict)": 0.0, "exact (loose)": 1.0}
    assert (items[3].written, items[3].chosen, items[3].loss) == ("five", None, None)


def test_statistics_are_what_they_say() -> None:
    rng = np.random.default_rng(0)
    inside = sum(low <= 0.3 <= high for low, high in (interval((rng.random(80) < 0.3).tolist()) for _ in range(100)))
    assert 88 <= inside <= 100  # of 95 in a hundred
    assert interval([1.0, 1.0]) == (1.0, 1.0)
    test = paired_test([0, 0, 0, 0, 0, 0, 1, 1], [1, 1, 1, 1, 1, 1, 1, 0])
    assert (test.better, test.worse, test.num_items, test.difference) == (6, 1, 8, 0.625)
    assert test.p_value == pytest.approx(2 * (1 + 7) / 2**7)  # the sign test on seven questions
    assert paired_test([0.2] * 30, (0.2 + 0.1 * rng.random(30)).tolist()).p_value < 0.01
    assert paired_test([0.5], [0.5]).p_value == 1.0
    bins, error = calibration([0.95, 0.91, 0.55], [True, False, True])
    assert [(one.count, one.accuracy) for one in bins] == [(1, 1.0), (2, 0.5)]
    assert error == pytest.approx((0.45 + 2 * 0.43) / 3)
    assert confusion([0, 1, 1], [1, 1, 0], 2).tolist() == [[0, 1], [1, 1]]


class Tags(HTMLParser):
    """Collects the tags of a page, and what they fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.fetched += [str(value) for name, value in attrs if name in ("src", "href")]


def test_the_page_shows_everything_and_fetches_nothing() -> None:
    page = render_results(evaluation([True] * 6 + [False] * 4), other=evaluation([False] * 10))
    tags = Tags()
    tags.feed(page)
    assert "script" not in tags.tags
    assert tags.fetched == []
    for words in ("0.6000", "&lt;script&gt;question", "no &lt;b&gt;", "calibration error", "6 / 0", "+0.6000"):
        assert words in page
    without = render_results(evaluation([True], with_samples=False))
    assert "Questions were not logged" in without


def test_the_command_compares_two_files(tmp_path: Path) -> None:
    first, second = tmp_path / "a.json", tmp_path / "b.json"
    first.write_text(json.dumps(evaluation([True, False] * 10)))
    second.write_text(json.dumps(evaluation([True] * 20)))
    done = run_command("compare", first, second, "--report", tmp_path / "it.html", "--json")
    assert done.returncode == 0, done.stderr
    (choice, *_) = json.loads(done.stdout)
    test = choice["test"]
    assert (test["num_items"], test["difference"], test["better"], test["worse"]) == (20, 0.5, 10, 0)
    assert test["p_value"] == pytest.approx(2 / 2**10)
    assert "Comparison" in (tmp_path / "it.html").read_text()
    assert "0.5000  1.0000" in run_command("compare", first, second).stdout
    second.write_text('{"results": {"other": {"acc,none": 1.0}}}')
    assert "no task in common: choice, texts and other" in run_command("compare", first, second).stderr
    second.write_text("[]")
    assert "holds no results of tasks" in run_command("compare", first, second).stderr


def test_what_is_no_mean_over_questions_is_not_tested() -> None:
    whole = evaluation([True, False])
    whole["results"]["choice"]["acc,none"] = 7.0  # as a perplexity is
    (choice, *_) = compare_results(whole, whole)
    assert choice.test is None
    with pytest.raises(ConfigError, match="no task in common"):
        compare_results(whole, {"results": {}})
