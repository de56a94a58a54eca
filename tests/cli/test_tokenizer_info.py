"""`megatron-7b tokenizer info`: names for what has no text, who decides the ids, and what transformers makes of it."""

import json
from pathlib import Path
from typing import Any

from tests.support.assets import asset
from tests.support.commands import run_command
from tests.tokenizer.foreign_folders import END, vocabulary_files, write_folder


def show(path: object, *arguments: str) -> dict[str, Any]:
    result = run_command("tokenizer", "info", path, *arguments)
    assert result.returncode == 0, result.stderr
    facts: dict[str, Any] = json.loads(result.stdout)
    return facts


def test_control_tokens_have_their_names(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(vocabulary_files("spm_bpe")["tokenizer.model"])
    model = show(tmp_path)
    assert (model["eod"], model["bos"]) == ({"id": 2, "text": "</s>"}, {"id": 1, "text": "<s>"})
    assert model["special"] == {"1": "<s>", "2": "</s>"}
    assert model["ids_decided_by"] == "the SentencePiece model alone"
    assert show("bytes")["eod"] == {"id": 256, "text": "<eod>"}


def test_a_real_folder(tmp_path: Path) -> None:
    facts = show(asset("smollm2-135m"))
    assert facts["eod"] == {"id": 2, "text": "<|im_end|>"}
    assert facts["ids_decided_by"] == "tokenizer.json"
    assert facts["transformers"] == "AutoTokenizer gives the same ids for all probes"
    assert facts["chat_template"]
    assert facts["sample"]["decoded"] == facts["sample"]["text"]
    assert "transformers" not in show(asset("smollm2-135m"), "--no-transformers")


def test_tokens_that_are_declared_beside_the_vocabulary(tmp_path: Path) -> None:
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|user|>"}
    facts = show(write_folder(tmp_path, "gpt2", {"tokenizer_config.json": config}))
    assert facts["eod"] == {"id": 400, "text": "<|user|>"}
    assert facts["ids_decided_by"].startswith("transformers' TokenizersBackend, because tokens are declared")
    assert facts["special"] == {"0": END, "400": "<|user|>"}


def test_a_file_that_is_named_without_its_folder(tmp_path: Path) -> None:
    config = {"tokenizer_class": "LlamaTokenizer", "eos_token": "<|user|>"}
    folder = write_folder(tmp_path, "spm_bpe", {"tokenizer_config.json": config})
    facts = show(folder / "tokenizer.model")
    assert facts["eod"] == {"id": 2, "text": "</s>"}
    assert facts["transformers"].startswith("other ids: transformers' LlamaTokenizer")
