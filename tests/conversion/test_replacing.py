"""--overwrite replaces what `convert` wrote before, and deletes nothing else."""

import shutil
from pathlib import Path

import pytest

from megatron_7b.cli.main import main
from megatron_7b.conversion.replacing import check_replaces_export, check_replaces_import
from megatron_7b.errors import PathError
from tests.conversion.tiny_models import save_tiny_model
from tests.support.checkpoint_runs import train_save
from tests.support.ranks import run_ranks
from tests.support.tiny_runs import tiny_config


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder."""
    folder = tmp_path_factory.mktemp("model")
    save_tiny_model("llama_tied", folder, vocab_size=300)
    return folder


@pytest.fixture(scope="module")
def imported(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as a checkpoint."""
    output = tmp_path_factory.mktemp("converted") / "checkpoint"
    assert main(["convert", "from-hf", "--input", str(model), "--output", str(output)]) == 0
    return output


def listing(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_outputs_of_the_same_command_may_be_replaced(model: Path, imported: Path, tmp_path: Path):
    check_replaces_export(model)
    check_replaces_import(imported)
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "absent"):
        check_replaces_export(folder)
        check_replaces_import(folder)


@pytest.mark.parametrize("left", ["run", "home", "other_kind"])
def test_a_folder_of_something_else_stays(left: str, model: Path, imported: Path, tmp_path: Path):
    """A run folder, a folder of somebody's files, and the output of the opposite direction, by the whole command."""
    for action, source, other in (("from-hf", model, model), ("to-hf", imported, imported)):
        output = tmp_path / action
        if left == "run":
            shutil.copytree(imported, output / "checkpoints" / "step_00000000")
            shutil.copy(imported / "config.yaml", output)
        elif left == "home":
            output.mkdir()
            (output / "thesis.tex").write_text("years of work")
        else:
            shutil.copytree(other, output)
        before = listing(output)
        option = "--input" if action == "from-hf" else "--checkpoint"
        assert main(["convert", action, option, str(source), "--output", str(output), "--overwrite"]) == 2
        assert listing(output) == before


def test_a_model_with_folders_of_its_own_stays(model: Path, tmp_path: Path):
    output = tmp_path / "clone"
    shutil.copytree(model, output)
    (output / "additional_chat_templates").mkdir()
    check_replaces_export(output)
    (output / ".git").mkdir()
    with pytest.raises(PathError, match=r"holds \.git/"):
        check_replaces_export(output)


@pytest.mark.parametrize("name", ["notes.txt", "tokenizer/notes.txt", ".hidden"])
def test_an_import_with_a_file_of_somebody_stays(name: str, imported: Path, tmp_path: Path):
    output = tmp_path / "copy"
    shutil.copytree(imported, output)
    check_replaces_import(output)
    (output / name).parent.mkdir(exist_ok=True)
    (output / name).touch()
    with pytest.raises(PathError, match="not of the checkpoint"):
        check_replaces_import(output)


def test_a_checkpoint_that_was_trained_stays(tmp_path: Path):
    run_ranks(1, train_save, tiny_config(), tmp_path / "checkpoints", 1)
    for name in ("latest", next((tmp_path / "checkpoints").glob("step_*")).name):
        with pytest.raises(PathError, match="a checkpoint of a run, at step 1"):
            check_replaces_import(tmp_path / "checkpoints" / name)
