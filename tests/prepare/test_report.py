"""The report: valid, complete, needing nothing from outside, and safe whatever the documents hold."""

import xml.etree.ElementTree as ET
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import override

import pytest

from megatron_7b.page_parts import format_seconds, format_share, format_size, histogram
from megatron_7b.prepare.accounting import Distributions, RunReport, Sample, StageCount
from megatron_7b.prepare.report.page import render_report, write_report

HOSTILE = '<script>alert("1")</script> & </pre><img src=http://example.com/x>'
_VOID = {"meta", "br", "img", "link"}


class Checker(HTMLParser):
    """Notes what is open, which tags there are, and the text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.addresses: list[str] = []
        self.text = ""

    @override
    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "action")]
        if tag not in _VOID:
            self.open.append(tag)

    @override
    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    @override
    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.text += data


@pytest.fixture
def report() -> RunReport:
    distributions = Distributions(
        lengths={"read": Counter({0: 3, 5: 10, 12: 900, 20: 1}), "kept": Counter({12: 700, 13: 5})},
        languages=Counter({f"l{number}": number for number in range(1, 40)}),
        sources={f"{n}/part.jsonl": Counter(read=1000 - n, kept=10) for n in range(120)}
        | {f"pages/{n}.html": Counter(read=2, kept=1) for n in range(800)}
        | {HOSTILE: Counter(read=500)},
        splits={"train": Counter(documents=69, characters=10_000), "validation": Counter(documents=1, characters=20)},
        duplicate_groups={"exact": Counter({1: 50, 2: 7, 3: 1}), "near": Counter({1: 50, 900: 1})},
    )
    stages = [
        StageCount("reading", 1234, 1200, quarantined=34, characters_in=5000, characters_kept=5000, seconds=0.5),
        StageCount("quality", 1200, 70, removed=Counter({"quality:gopher:short": 1100, HOSTILE: 30}), seconds=1.0),
        StageCount("pii", 70, 70, changes=Counter(email=12), peak_memory=3 << 20),
        StageCount("augmentation", 70, 140, added=70, characters_kept=1_234_567),
    ]
    inputs = [{"path": "0/part.jsonl", "bytes": 1_500_000}]
    recipe: dict[str, object] = {"quality": {"c4": False, "words": HOSTILE}}
    return RunReport("1.0", ["megatron-7b", "data", "prepare"], recipe, inputs, stages, distributions, 75.2, 2)


SAMPLES = {
    "quality": [Sample("quality", "quality:gopher:short", f"{n} words", HOSTILE, n, HOSTILE * 30) for n in range(9)]
}


def parse(page: str) -> Checker:
    checker = Checker()
    checker.feed(page)
    checker.close()
    assert checker.open == []
    return checker


def test_it_needs_nothing_and_runs_nothing(report: RunReport) -> None:
    page = parse(render_report(report, SAMPLES))
    assert page.addresses == []
    assert page.tags["script"] == page.tags["img"] == page.tags["link"] == 0
    assert HOSTILE in page.text


def test_the_figures_are_there(report: RunReport) -> None:
    page = parse(render_report(report, SAMPLES))
    for expected in (
        "1,234", "140", "1.23 M", "1.5 MB", "1 min 15 s", "with 2 workers", "quality:gopher:short", "1,100",
        "12 email", "9 documents dropped as repeating one of 8",
        "899 documents dropped as repeating one of 1", "14 more", "megatron-7b data prepare",
        "The 40 with the most documents of 122", "pages/ (800 files)", "1,600", "unreadable records",
        "34", "0/part.jsonl", "validation",
    ):  # fmt: skip
        assert expected in page.text, expected
    assert page.tags["pre"] == 3 + 1  # samples of one reason, and the recipe
    assert page.tags["svg"] == 3


def test_a_run_that_dropped_nothing(report: RunReport, tmp_path: Path) -> None:
    report.stages = [StageCount("reading")]
    report.distributions = Distributions()
    write_report(report, {}, tmp_path / "report.html")
    page = parse((tmp_path / "report.html").read_text())
    assert "Nothing was dropped" in page.text
    assert "Splits" not in page.text
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_clean_data_has_no_empty_columns_and_no_speeds_of_an_instant(report: RunReport) -> None:
    report.stages = [
        StageCount("reading", 120, 120, characters_in=6_840_000, characters_kept=6_840_000, seconds=0.0003),
        StageCount("gopher_quality", 120, 120, characters_in=6_840_000, characters_kept=6_840_000, seconds=2.0),
    ]
    report.distributions.splits = {"train": Counter(documents=120, characters=9), "test": Counter(documents=0)}
    page = parse(render_report(report, {}))
    assert "All 120 documents passed every stage." in page.text
    assert "3.4" in page.text
    assert "22,800" not in page.text
    assert "e+" not in page.text
    assert "< 0.1 s" in page.text
    for absent in ("dropped. In every row", "made", "test"):
        assert absent not in page.text, absent


def test_columns_are_as_high_as_their_counts() -> None:
    svg = ET.fromstring(histogram([("read", {3: 10, 4: 5}), ("kept", {4: 2})], {3: "8"}, axis="length"))
    heights = [float(column.get("height", 0)) for column in svg.iter("rect")]
    assert heights[0] == max(heights)
    assert heights[1] == pytest.approx(heights[0] / 2, abs=0.1)
    assert heights[2] == pytest.approx(heights[0] / 5, abs=0.1)


def test_figures_as_people_write_them() -> None:
    assert [format_size(value) for value in (0, 7, 999, 1000, 999_600, 2.5e9)] == [
        "0",
        "7",
        "999",
        "1 k",
        "1 M",
        "2.5 G",
    ]
    assert [format_share(part, 10_000) for part in (0, 1, 500, 9_999, 10_000)] == [
        "0.0 %", "< 0.1 %", "5.0 %", "> 99.9 %", "100.0 %",
    ]  # fmt: skip
    assert [format_seconds(value) for value in (0.51, 12.3, 61, 3599.7, 7260)] == [
        "0.5 s", "12 s", "1 min 1 s", "1 h 0 min", "2 h 1 min",
    ]  # fmt: skip
