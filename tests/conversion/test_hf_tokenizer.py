"""Tokenizer files are carried as they are, and transformers is told to run them as they stand."""

import json
from pathlib import Path

import pytest

from megatron_7b.conversion.folder_writer import write_json
from megatron_7b.conversion.hf_tokenizer import PROBE_TEXTS, copy_tokenizer, name_tokenizer_class, transformers_ids
from megatron_7b.errors import ConversionError
from megatron_7b.tokenizer import load_tokenizer
from tests.conversion.tiny_models import save_tiny_tokenizer


def test_the_files_of_a_tokenizer_and_no_others_are_copied(tmp_path: Path):
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "additional_chat_templates").mkdir(parents=True)
    target.mkdir()
    names = ["tokenizer.json", "chat_template.jinja", "additional_chat_templates/tool.jinja"]
    for name in [*names, "model.safetensors", "README.md"]:
        (source / name).write_text(name)
    assert copy_tokenizer(source, target) == names
    assert all((target / name).read_text() == name for name in names)
    assert sorted(path.name for path in target.iterdir()) == sorted({name.split("/")[0] for name in names})


def test_a_folder_without_vocabulary_has_no_tokenizer(tmp_path: Path):
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert copy_tokenizer(tmp_path, tmp_path) == []


@pytest.mark.parametrize("settings", [None, {}, {"eos_token": "<|end|>"}])
def test_a_tokenizer_without_class_is_run_as_it_stands(settings: dict[str, str] | None, tmp_path: Path):
    save_tiny_tokenizer(tmp_path)
    write_json(tmp_path / "config.json", {"model_type": "qwen3", "transformers_version": "5.0.0"})
    (tmp_path / "tokenizer_config.json").unlink()
    if settings is not None:
        write_json(tmp_path / "tokenizer_config.json", settings)
    ours = load_tokenizer(tmp_path).encode_batch(PROBE_TEXTS)
    assert transformers_ids(tmp_path) != ours, "transformers no longer puts its own rules in place: simplify"
    name_tokenizer_class(tmp_path)
    assert transformers_ids(tmp_path) == ours
    assert json.loads((tmp_path / "tokenizer_config.json").read_text()).items() >= (settings or {}).items()


def test_a_class_that_is_named_is_kept(tmp_path: Path):
    (tmp_path / "tokenizer.json").write_text("{}")
    write_json(tmp_path / "tokenizer_config.json", {"tokenizer_class": "MyTokenizer"})
    name_tokenizer_class(tmp_path)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text()) == {"tokenizer_class": "MyTokenizer"}


def test_what_transformers_cannot_load_is_said(tmp_path: Path):
    with pytest.raises(ConversionError, match="transformers cannot load the tokenizer"):
        transformers_ids(tmp_path)
