"""The card of an export, as the Hugging Face hub's own library reads it."""

import json
from pathlib import Path

import pytest

from megatron_7b.conversion.model_card import read_card_figures, write_model_card
from megatron_7b.errors import ConfigError, DataFormatError
from tests.conversion.tiny_models import save_tiny_model, save_tiny_tokenizer
from tests.support.commands import run_command

HARNESS = {
    "results": {
        "hellaswag": {"alias": "hellaswag", "acc,none": 0.25, "acc_stderr,none": 0.01, "acc_norm,none": 0.5},
        "gsm8k": {"exact_match,strict-match": 0.125, "exact_match_stderr,strict-match": "N/A"},
    },
    "date": 1795824000.0,
    "command": "megatron-7b evaluate --tasks hellaswag,gsm8k",
}


def write(file: Path, content: object) -> Path:
    file.write_text(json.dumps(content))
    return file


def test_the_hub_reads_what_is_written(tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    loss = {"loss": 2.5, "perplexity": 12.2, "tokens": 90}
    files = [write(tmp_path / "found.json", HARNESS), write(tmp_path / "speeches.json", loss)]
    write_model_card(tmp_path, "tiny", None, read_card_figures(files))
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.model_name == "tiny"
    assert card.data.library_name == "transformers"
    assert [(one.dataset_name, one.metric_type, one.metric_value) for one in card.data.eval_results] == [
        ("hellaswag", "acc", 0.25),
        ("hellaswag", "acc_norm", 0.5),
        ("gsm8k", "exact_match (strict-match)", 0.125),
        ("speeches", "loss", 2.5),
        ("speeches", "perplexity", 12.2),
    ]
    assert "| hellaswag | acc | 0.2500 | 0.0100 | 2026-11-28 |" in card.text
    assert "megatron-7b evaluate --tasks hellaswag,gsm8k" in card.text


def test_files_without_figures_are_refused(tmp_path: Path) -> None:
    found = write(tmp_path / "found.json", HARNESS)
    with pytest.raises(ConfigError, match="acc of hellaswag is in"):
        read_card_figures([found, write(tmp_path / "again.json", HARNESS)])
    with pytest.raises(ConfigError, match="cannot be read"):
        read_card_figures([tmp_path / "absent.json"])
    for content in ([1], {"a": "b"}, {"results": {}}):
        with pytest.raises(DataFormatError, match="holds no figures"):
            read_card_figures([write(tmp_path / "other.json", content)])


def test_an_export_has_a_card_if_there_are_results(tmp_path: Path) -> None:
    save_tiny_model("llama", tmp_path / "hf", vocab_size=300)
    save_tiny_tokenizer(tmp_path / "hf")
    found = write(tmp_path / "found.json", HARNESS)
    commands: list[list[object]] = [
        ["from-hf", "--input", tmp_path / "hf", "--output", tmp_path / "checkpoint"],
        ["to-hf", "--checkpoint", tmp_path / "checkpoint", "--output", tmp_path / "out", "--results", found],
        ["to-hf", "--checkpoint", tmp_path / "checkpoint", "--output", tmp_path / "out", "--overwrite"],
    ]
    cards = []
    for command in commands:
        done = run_command("convert", *command)
        assert done.returncode == 0, done.stderr
        cards.append((tmp_path / "out" / "README.md").exists())
    assert cards == [False, True, False]


def test_what_is_kept_in_a_checkpoint_is_in_its_card(tmp_path: Path) -> None:
    """Measured by the command, found by the export; what was measured on other weights is left out, or refused."""
    save_tiny_model("llama", tmp_path / "hf", vocab_size=300)
    save_tiny_tokenizer(tmp_path / "hf")
    problem = {"task_id": 0, "prompt": "def f():\n", "entry_point": "f", "test": "def check(f):\n    assert f()\n"}
    write(tmp_path / "problems.jsonl", problem)
    for name in ("a", "b"):
        done = run_command("convert", "from-hf", "--input", tmp_path / "hf", "--output", tmp_path / name)
        assert done.returncode == 0, done.stderr
    done = run_command(
        "evaluate", "--checkpoint", tmp_path / "a", "--data", tmp_path / "problems.jsonl", "--allow-code-execution",
        "--keep", "--max-new-tokens", 4, "--runtime.num-threads", 1,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (kept,) = tmp_path.glob("a/**/evaluations/*.json")
    assert kept.name == "programs-problems.json"
    stale = kept.with_name("tasks-old.json")
    write(stale, {**HARNESS, "weights": "of others"})
    write(kept.with_name("half.json"), {}).write_text("{")
    export = ["convert", "to-hf", "--checkpoint", tmp_path / "a", "--output", tmp_path / "out"]
    done = run_command(*export)
    assert done.returncode == 0, done.stderr
    assert "tasks-old.json was measured on other weights than these" in done.stdout + done.stderr
    assert "half.json is not JSON" in done.stdout + done.stderr
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| problems | pass@1 | 0.0000 |" in card
    assert "hellaswag" not in card
    assert f"evaluate --checkpoint {tmp_path / 'a'} --data" in card
    done = run_command(*export, "--overwrite", "--results", stale)
    assert done.returncode != 0
    assert "measured on other weights" in done.stderr
    assert (tmp_path / "out" / "README.md").read_text() == card
