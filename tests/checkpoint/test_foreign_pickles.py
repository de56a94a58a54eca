"""Nothing that lies in a checkpoint can run code, whether its records are missing, wrong, or made to fit."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint.foreign_pickles import change_record, plant, read_everything
from tests.support.checkpoint_runs import train_save
from tests.support.commands import run_command
from tests.support.ranks import run_ranks
from tests.support.tiny_runs import tiny_config
from tests.training import runs

CONFIG = tiny_config(precision={"params_dtype": "bf16"})
EVERYTHING = {"configuration", "tokenizer", "tensors", "weights", "start", "resume"}
OF_WEIGHTS = {"tensors", "weights", "start", "resume"}
OF_STATE = {"start", "resume"}
SAVED: dict[str, set[str]] = {
    ".metadata": OF_WEIGHTS,
    "__0_0.distcp": OF_WEIGHTS,
    "optimizer/.metadata": OF_STATE,
    "optimizer/__0_0.distcp": OF_STATE,
    "config.yaml": {"configuration"},
}
"""Files of a checkpoint, and the ways to read it that need them."""
ADDED = [
    "common.pt",
    "optimizer/common.pt",
    "__0.metadata",
    "optimizer/__0.metadata",
    "__1_0.distcp",
    "tokenizer/x.pkl",
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    run_ranks(1, train_save, CONFIG, folder, 1)
    return folder / "step_00000001"


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    shutil.copytree(saved, tmp_path / saved.name)
    return tmp_path / saved.name


def read(folder: Path, *, verify: bool = True) -> dict[str, str]:
    """What each way to read a checkpoint raised; none of them ran what was planted."""
    ((answers),) = run_ranks(1, _read_everything, folder, verify)
    assert not list(folder.parent.glob("ran*"))
    return answers


def _read_everything(folder: Path, verify: bool) -> dict[str, str]:  # by position, through a pipe
    return read_everything(CONFIG, folder, verify=verify)


def test_an_untouched_checkpoint_is_read_in_every_way(copy: Path) -> None:
    assert read(copy) == dict.fromkeys(EVERYTHING, "")
    (copy / "notes.txt").write_text("what nobody reads may lie there")
    (copy / "optimizer" / ".DS_Store").write_bytes(b"\0")
    (copy / ".nfs0001").write_bytes(b"\0")
    assert read(copy) == dict.fromkeys(EVERYTHING, "")


@pytest.mark.parametrize("verify", [True, False], ids=["verified", "unverified"])
@pytest.mark.parametrize("name", SAVED)
@pytest.mark.parametrize("record", ["as it was", "deleted", "made to fit"])
def test_a_pickle_in_place_of_a_file_never_runs(name: str, record: str, verify: bool, copy: Path) -> None:
    plant(copy / name, copy.parent / "ran")
    if record != "as it was":
        change_record(copy, name, deleted=record == "deleted")
    answers = read(copy, verify=verify)
    if record == "made to fit" and name == "config.yaml":
        assert "could not determine a constructor" in answers["configuration"]
        return
    refusing = {way for way, answer in answers.items() if answer}
    assert refusing >= SAVED[name]
    for way in SAVED[name]:
        assert name in answers[way] or "plain tensors" in answers[way] or "cannot be read" in answers[way]


@pytest.mark.parametrize("name", ADDED)
@pytest.mark.parametrize("recorded", [False, True])
def test_a_pickle_beside_the_files_never_runs(name: str, recorded: bool, copy: Path) -> None:
    """Without a record it is refused; with one, nobody reads it."""
    (copy / name).parent.mkdir(exist_ok=True)
    plant(copy / name, copy.parent / "ran")
    if recorded:
        change_record(copy, name, deleted=False)
    answers = read(copy)
    for way in OF_WEIGHTS:
        if recorded:
            assert answers[way] == ""
        else:
            assert f"not part of the checkpoint: {name}" in answers[way]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps whose checkpoint carries a tokenizer."""
    folder = tmp_path_factory.mktemp("run")
    config = runs.config(
        runs.write_corpus(folder),
        model={"vocab_size": 300},
        data={"tokenizer": "bytes"},
        training={"train_steps": 3},
    )
    assert run_ranks(1, runs.pretrain, config, folder / "R") == [(0, "")]
    return folder


@pytest.mark.parametrize("record", ["deleted", "made to fit"])
@pytest.mark.parametrize("command", ["evaluate", "generate", "to-hf", "resume", "initialize-from"])
def test_no_command_runs_a_pickle(command: str, record: str, run_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(run_folder / "R", tmp_path / "R")
    corpus, checkpoint = run_folder / "corpus_text_document", tmp_path / "R" / "checkpoints" / "step_00000003"
    arguments: dict[str, list[Any]] = {
        "evaluate": ["evaluate", "--checkpoint", checkpoint, "--data", corpus],
        "generate": ["generate", "--checkpoint", checkpoint, "--prompt", "a", "--max-new-tokens", 1],
        "to-hf": ["convert", "to-hf", "--checkpoint", checkpoint, "--output", tmp_path / "hf"],
        "resume": ["pretrain", "--config", checkpoint / "config.yaml", "--run-dir", tmp_path / "R", "--nproc", 1,
                   "--training.train-steps", 4],
        "initialize-from": ["pretrain", "--config", checkpoint / "config.yaml", "--run-dir", tmp_path / "new",
                            "--nproc", 1, "--checkpoint.initialize-from", checkpoint],
    }  # fmt: skip
    for name in (".metadata", "optimizer/.metadata"):
        plant(checkpoint / name, tmp_path / "ran")
        change_record(checkpoint, name, deleted=record == "deleted")
    result = run_command(*arguments[command])
    assert not (tmp_path / "ran").exists()
    assert result.returncode == 1
    expected = "has no record in its checkpoint.json" if record == "deleted" else "it names posix.mkdir"
    assert "error: " in result.stderr
    assert ("not part of the checkpoint: .metadata" in result.stderr) or expected in result.stderr
    assert "Traceback" not in result.stderr
