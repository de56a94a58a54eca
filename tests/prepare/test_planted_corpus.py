"""The benchmark of data preparation in small: what is planted is found, and nearly nothing else goes."""

import itertools
import json
import subprocess
import sys
from typing import Any

import pytest

from tests.support.assets import REPOSITORY, asset


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    for extra in ("fastwarc", "resiliparse", "fasttext", "rensa"):
        pytest.importorskip(extra)
    script = REPOSITORY / "tools" / "benchmarks" / "prepare.py"
    command = [sys.executable, str(script), "--scale", "0.05", "--documents", "3000", "--json", "--output", "-"]
    command += ["--speeches", str(asset("sotu.jsonl")), "--plays", str(asset("shakespeare.jsonl"))]
    result = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)
    assert result.returncode == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_what_is_planted_is_found(results: dict[str, Any]) -> None:
    findings = {finding["kind"]: finding for finding in results["planted"]["findings"]}
    clean = findings.pop("clean documents")
    assert clean["wrong"] <= 0.02 * clean["planted"]
    assert clean["planted"] > 400
    assert len(findings) == 10
    near = findings.pop("near copies, 2% of words edited")
    assert near["found"] >= 0.95 * near["planted"]
    for finding in findings.values():
        assert finding["planted"] >= 5
        assert finding["found"] == finding["planted"], finding
        assert finding["wrong"] == 0, finding


def test_every_stage_is_counted(results: dict[str, Any]) -> None:
    stages = results["planted"]["stages"]
    for before, after in itertools.pairwise(stages):
        assert before["kept"] == after["documents_in"]
    for stage in stages:
        given, gone = stage["documents_in"] + stage["added"], sum(stage["removed"].values()) + stage["quarantined"]
        assert given == stage["kept"] + gone, stage["name"]
    assert {"duplicate:exact", "duplicate:near", "decontamination", "language:de"} <= set(results["planted"]["reasons"])


def test_near_duplicates_among_many(results: dict[str, Any]) -> None:
    near = results["near"]
    assert near["recall"]["1%"] >= near["recall"]["2%"] >= 0.97
    assert near["recall"]["5%"] > 0.5
    assert near["precision"] >= 0.99
    assert near["halves_dropped"] == 0
