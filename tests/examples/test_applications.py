"""The applications in examples/: what they make of predictions."""

import datetime as dt
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.finetune import test_classic
from tests.support.assets import REPOSITORY

folder = test_classic.folder
APPLICATIONS = REPOSITORY / "examples" / "applications"


def run_script(name: str, *arguments: object, given: str | None = None) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, str(APPLICATIONS / name), *map(str, arguments)]
    return subprocess.run(command, input=given, capture_output=True, text=True, cwd=REPOSITORY)


def posts(days: int, risen_from: int, *, per_day: int = 30) -> list[dict[str, Any]]:
    """Predictions for dated texts, of which a fifth are negative, from some day on more than half."""
    draw, first = random.Random(3), dt.date(2026, 10, 1)
    return [
        {
            "date": f"{first + dt.timedelta(day)}T12:00:00",
            "prediction": {"label": "bad" if draw.random() < (0.55 if day >= risen_from else 0.2) else "good"},
        }
        for day in range(days)
        for _ in range(per_day)
    ]


def test_opinion_raises_one_alert_when_it_turns(tmp_path: Path):
    stream = "\n".join(map(json.dumps, posts(40, 30)))
    output = ("--negative", "bad", "--plot", tmp_path / "opinion.png", "--alerts", tmp_path / "alerts.jsonl")
    done = run_script("opinion_monitor.py", *output, given=stream)
    assert done.returncode == 0, done.stderr
    (alert,) = [json.loads(line) for line in (tmp_path / "alerts.jsonl").read_text().splitlines()]
    assert dt.date(2026, 10, 31) <= dt.date.fromisoformat(alert["date"]) <= dt.date(2026, 11, 1)
    assert alert["before"] < 0.25 < alert["share"]
    assert done.stdout.startswith(alert["date"])
    assert (tmp_path / "opinion.png").read_bytes().startswith(b"\x89PNG")
    calm = run_script("opinion_monitor.py", "--negative", "bad", given="\n".join(map(json.dumps, posts(40, 99))))
    assert (calm.returncode, calm.stdout) == (0, "")
    wrong = run_script("opinion_monitor.py", given='{"text": "no date"}')
    assert wrong.returncode == 1
    assert "line 1 has no date" in wrong.stderr


def test_items_are_ranked_for_each_reader(tmp_path: Path):
    values = {"ann": [(0.2, 0.0), (0.9, 1.0), (0.5, 0.0)], "bob": [(0.9, 0.0), (0.1, 1.0), (0.3, 0.0)]}
    records = [
        {"user": user, "text_pair": f"{user} {number}", "label": label, "prediction": {"value": value}}
        for user, items in values.items()
        for number, (value, label) in enumerate(items)
    ]
    file = tmp_path / "predicted.jsonl"
    file.write_text("\n".join(map(json.dumps, records)))
    done = run_script("interest_ranking.py", file, "--group", "user", "--top", 3)
    assert done.returncode == 0, done.stderr
    ann, bob = map(json.loads, done.stdout.splitlines())
    assert [one["text_pair"] for one in ann["items"]] == ["ann 1", "ann 2", "ann 0"]
    assert [one["interest"] for one in bob["items"]] == [0.9, 0.3, 0.1]
    found = json.loads(done.stderr)
    assert found["mrr@3"] == pytest.approx((1 + 1 / 3) / 2)
    assert found["ndcg@3"] == pytest.approx((1 + 0.5) / 2)  # third place: 1 / log2(4)


def test_questions_are_answered_from_the_passage_that_fits(folder: Path, tmp_path: Path):
    (tmp_path / "asked.jsonl").write_text("\n".join(map(json.dumps, test_classic.asked(24)[1::3])))  # all have answers
    learned = test_classic.finetune(
        folder, "question_answering", tmp_path / "run", "--data.train", tmp_path / "asked.jsonl"
    )
    assert learned.returncode == 0, learned.stderr
    texts = [
        "the cat sat on the mat, a nap at 12\n\nzebras and other animals of the plain",
        "很多人喜欢在公园里散步，因为空气很好，很安静。",
    ]
    documents = tmp_path / "documents.jsonl"
    documents.write_text("\n".join(json.dumps({"text": text, "title": "t"}) for text in texts))
    asked = ("--question", "which zebras", "--question", "为什么去公园", "--question", "xylophone")
    done = run_script("domain_qa.py", "--checkpoint", tmp_path / "run", "--documents", documents, *asked)
    assert done.returncode == 0, done.stderr
    zebras, park, nothing = map(json.loads, done.stdout.splitlines())
    for found, document, beginning in ((zebras, 1, "zebras"), (park, 2, "很多人")):
        assert found["passage"].startswith(beginning)
        assert found["document"] == document
        assert found["passage"][found["start"] : found["end"]] == found["answer"] != ""
    assert nothing == {"question": "xylophone", "answer": "", "score": 0.0}
