"""What an import brings beside weights: through training, checkpoints and resumes, and out again as it was."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_7b.checkpoint import Companions
from megatron_7b.checkpoint.companions import forget_other_ids, text_end_ids
from megatron_7b.cli.main import main
from megatron_7b.conversion.companions import gather_companions
from megatron_7b.conversion.json_files import read_json, write_json
from megatron_7b.errors import CheckpointError
from megatron_7b.tokenizer import load_tokenizer
from tests.conversion.tiny_models import save_tiny_model, save_tiny_tokenizer
from tests.data.corpora import write_corpus
from tests.support.commands import run_command

ENDS = [0, 1, 17]
LENGTH = 64
UNCHANGED = {
    "generation_config.json": json.dumps({"eos_token_id": ENDS, "do_sample": True, "temperature": 0.5}),
    "preprocessor_config.json": '{"crop_size":  224}',
    "LICENSE": "as it is",
    "README.md": "# A model\n",
    "chat_template.jinja": "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}",
    "additional_chat_templates/tool_use.jinja": "{{ messages }}",
    "special_tokens_map.json": '{"eos_token": "<|end|>",   "pad_token": "<|pad|>"}',
}
FOREIGN_KEYS: dict[str, Any] = {"eos_token_id": ENDS, "pad_token_id": 1, "task_specific_params": {"a": [1, 2]}}
LEFT = ["modeling_own.py", "original/", "too_large.txt"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that folders of chat models have."""
    folder = tmp_path_factory.mktemp("source")
    save_tiny_tokenizer(folder)
    save_tiny_model("llama", folder, vocab_size=300)
    for name, content in UNCHANGED.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content)
    write_json(folder / "config.json", read_json(folder / "config.json") | FOREIGN_KEYS)
    (folder / "modeling_own.py").write_text("raise SystemExit('ran')")
    (folder / "original").mkdir()
    (folder / "original" / "params.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    (folder / ".gitattributes").touch()
    with (folder / "too_large.txt").open("wb") as file:
        file.truncate(17 << 20)
    return folder


@pytest.fixture(scope="module")
def checkpoint(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("imported") / "checkpoint"
    assert main(["convert", "from-hf", "--input", str(source), "--output", str(output)]) == 0
    return output


@pytest.fixture(scope="module")
def run_folder(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that starts from the import, stops after a step and goes on after the import has been moved away."""
    folder = tmp_path_factory.mktemp("run")
    start = folder / "start"
    shutil.copytree(checkpoint, start)
    prefix = write_corpus(folder / "corpus", [list(range(2, 2 + 5 * 32 + 1))])
    arguments = [
        *("pretrain", "--config", start / "config.yaml", "--run-dir", folder / "R", "--nproc", 1),
        *("--checkpoint.initialize-from", start, "--data.train", prefix, "--data.split", "100,0,0"),
        *("--data.seq-length", 32, "--training.global-batch-size", 1, "--training.micro-batch-size", 1),
        *("--telemetry.plot", "False", "--training.train-steps"),
    ]
    for steps in (1, 2):
        result = run_command(*arguments, steps)
        assert result.returncode == 0, result.stderr
        if steps == 1:
            (start / "hugging_face").rename(folder / "gone")
    return folder / "R"


def export(checkpoint: Path, output: Path) -> Path:
    assert main(["convert", "to-hf", "--checkpoint", str(checkpoint), "--output", str(output)]) == 0
    return output


@pytest.mark.parametrize("trained", [False, True])
def test_everything_goes_out_as_it_came_in(
    trained: bool, source: Path, checkpoint: Path, request: pytest.FixtureRequest, tmp_path: Path
):
    output = export(request.getfixturevalue("run_folder") if trained else checkpoint, tmp_path / "out")
    for name in (*UNCHANGED, "tokenizer.json", "tokenizer_config.json"):
        assert (output / name).read_bytes() == (source / name).read_bytes(), name
    config = read_json(output / "config.json")
    assert config.items() >= FOREIGN_KEYS.items()
    before = read_json(source / "config.json")
    assert {key: before[key] for key in before.keys() - config.keys()} == {}
    assert not any((output / name).exists() for name in (*LEFT, "pytorch_model.bin", ".gitattributes", "config.yaml"))


def test_transformers_stops_at_the_same_tokens_before_and_after(source: Path, checkpoint: Path, tmp_path: Path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    texts = []
    for folder in (source, export(checkpoint, tmp_path / "out")):
        model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        assert model.generation_config.eos_token_id == ENDS
        torch.manual_seed(3)
        ids = [model.generate(torch.tensor([[token]]), max_new_tokens=LENGTH)[0].tolist() for token in range(9, 29)]
        assert any(text[-1] in ENDS for text in ids), "nothing was stopped"
        messages = [{"role": "user", "content": "the cat"}]
        texts.append((ids, tokenizer.apply_chat_template(messages, tokenize=False)))
    assert texts[0] == texts[1]


def test_what_stays_behind_is_named(source: Path, tmp_path: Path):
    gathered = gather_companions(source, tmp_path)
    assert list(gathered.left) == LEFT
    names = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    of_tokenizer = {name for name in UNCHANGED if "template" in name or "special" in name}
    assert names == {
        *(f"tokenizer/{name}" for name in (*of_tokenizer, "tokenizer.json", "tokenizer_config.json", "config.json")),
        *(f"hugging_face/{name}" for name in (*(UNCHANGED.keys() - of_tokenizer), "config.json")),
    }


def test_every_checkpoint_and_the_run_folder_carry_them(source: Path, checkpoint: Path, run_folder: Path):
    for place in (checkpoint, run_folder, run_folder / "checkpoints" / "latest"):
        companions = Companions.of(place)
        assert companions.tokenizer is not None
        assert companions.hugging_face is not None
        assert (companions.hugging_face / "LICENSE").read_text() == UNCHANGED["LICENSE"]
        assert load_tokenizer(companions.tokenizer).identity == load_tokenizer(source).identity
    assert not list(run_folder.glob(".tmp*"))


def test_a_context_that_was_changed_is_said_everywhere(source: Path, tmp_path: Path):
    arguments = ["--input", str(source), "--output", str(tmp_path / "c"), "--max-position-embeddings", "128"]
    assert main(["convert", "from-hf", *arguments]) == 0
    output = export(tmp_path / "c", tmp_path / "out")
    assert read_json(output / "config.json")["max_position_embeddings"] == 128
    settings, before = read_json(output / "tokenizer_config.json"), read_json(source / "tokenizer_config.json")
    assert settings == {**before, "model_max_length": 128}


def test_ids_of_another_tokenizer_are_forgotten(tmp_path: Path):
    """An import without a tokenizer, and a run that brings one whose end of document is another."""
    for name in ("config.json", "generation_config.json"):
        write_json(tmp_path / name, {"eos_token_id": 5 if name == "config.json" else [5, 6]})
    (tmp_path / "LICENSE").touch()
    assert text_end_ids(tmp_path) == {5, 6}
    forget_other_ids(tmp_path, 6)
    forget_other_ids(tmp_path, None)
    assert len(list(tmp_path.iterdir())) == 3
    forget_other_ids(tmp_path, 7)
    assert [path.name for path in tmp_path.iterdir()] == ["LICENSE"]
    assert text_end_ids(tmp_path) == frozenset()


@pytest.mark.parametrize("content", ["{", "[1]"])
def test_damaged_settings_are_named(content: str, tmp_path: Path):
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(CheckpointError, match="generation_config.json"):
        text_end_ids(tmp_path)
