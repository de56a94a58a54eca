"""`megatron-7b data prepare` as a user types it."""

import sys
from pathlib import Path

import pytest

from megatron_7b.cli.main import main
from tests.prepare.raw_files import write_raw_files


def run(*arguments: str | Path) -> int:
    return main(["data", "prepare", *map(str, arguments)])


def test_without_a_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_raw_files(tmp_path / "raw")
    (tmp_path / "raw" / "notes.pdf").touch()
    assert (
        run("--input", tmp_path / "raw", "--output-dir", tmp_path / "clean", "--languages", "en", "--workers", 1) == 0
    )
    shown = capsys.readouterr()
    rows = {line.split()[0]: line.split()[1:4] for line in shown.out.splitlines() if len(line.split()) > 4}
    assert rows["reading"] == ["48", "46", "2"]
    assert rows["language"] == ["46", "45", "1"]
    assert rows["exact_duplicates"] == ["44", "43", "1"]
    assert "unreadable records: 1," in shown.out
    assert "left out: 1 .pdf" in shown.err
    assert (
        run("--input", tmp_path / "raw", "--output-dir", tmp_path / "clean", "--languages", "en", "--workers", 2) == 0
    )
    assert run("--input", tmp_path / "raw", "--output-dir", tmp_path / "clean") == 2
    assert "holds the result of another recipe" in capsys.readouterr().err


def test_all_mistakes_of_a_recipe_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "quality: {gopher: {min_words: 3}}\n"
        "language: {min_score: high}\n"
        "per_source:\n  - files: '*.txt'\n    split: {test: 0.1}\n"
    )
    assert run("--input", "nowhere", "--output-dir", tmp_path / "clean", "--config", recipe, "--worker", 3) == 2
    message = capsys.readouterr().err
    for part in (
        "did you mean quality.gopher_quality.min_words?",
        "language.min_score = high",
        "split.test = 0.1",
        "may not differ per source",
        "did you mean --workers?",
    ):
        assert part in message
    assert not (tmp_path / "clean").exists()


def test_groups_are_turned_on_and_off_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run("--help")
    shown = capsys.readouterr().out
    assert "--quality.c4 {}|none  (default: none)" in shown
    assert "--quality.gopher-quality {}|none  (default: {})" in shown
    assert "--duplicates.similarity FLOAT" in shown


@pytest.mark.parametrize("module", ["fasttext", "rensa", "fastwarc.warc", "resiliparse.parse.encoding"])
def test_a_library_that_is_missing_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], module: str
) -> None:
    write_raw_files(tmp_path / "raw")
    monkeypatch.setitem(sys.modules, module, None)
    assert run("--input", tmp_path / "raw", "--output-dir", tmp_path / "clean") == 2
    message = capsys.readouterr().err
    assert module.partition(".")[0] in message
    assert "hint:" in message
    assert "install" in message
    assert not (tmp_path / "clean").exists()
