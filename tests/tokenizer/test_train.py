"""`megatron-7b tokenizer train` as a user runs it, and the folder read back by transformers."""

import json
import subprocess
import sys
from pathlib import Path

import orjson
import pytest

from megatron_7b.errors import ConfigError, DataFormatError
from megatron_7b.tokenizer import load_tokenizer
from megatron_7b.tokenizer.train import BpeOptions, save_hugging_face_folder, train_bpe
from tests.support.assets import asset


def run_tokenizer(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megatron_7b", "tokenizer", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "tokenizer"
    result = run_tokenizer(
        "train", "--input", asset("sotu.jsonl"), "--vocab-size", 1024, "--output", folder, "--sample-mb", 2
    )
    assert result.returncode == 0, result.stderr
    assert "1,024 tokens" in result.stdout
    return folder


def test_it_is_lossless_and_has_its_roles(trained: Path) -> None:
    tokenizer = load_tokenizer(trained)
    assert tokenizer.vocab_size == 1024
    assert (tokenizer.eod_id, tokenizer.bos_id, tokenizer.pad_id) == (0, 0, 1)
    text = orjson.loads(asset("sotu.jsonl").read_bytes().splitlines()[100])["text"]
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert len(ids) < len(text) / 2.5
    every_character = "".join(map(chr, range(0x3000)))
    assert tokenizer.decode(tokenizer.encode(every_character)) == every_character


def test_transformers_loads_the_same(trained: Path) -> None:
    from transformers import AutoTokenizer

    ours, theirs = load_tokenizer(trained), AutoTokenizer.from_pretrained(trained)
    text = "The State of the Union in 1790.\n\n<|endoftext|> naïve \U0001f600"
    assert theirs(text, add_special_tokens=False)["input_ids"] == ours.encode(text)
    assert (theirs.eos_token_id, theirs.bos_token_id, theirs.pad_token_id) == (0, 0, 1)
    assert len(theirs) == ours.vocab_size
    assert theirs.model_max_length == 2048
    assert theirs.decode(ours.encode(text)) == text


def test_options(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text(
        "".join(json.dumps({"body": f"year {1900 + n} 1900 1900"}) + "\n" for n in range(200)) + "broken\n"
    )
    arguments = ["train", "--input", corpus, "--json-key", "body", "--vocab-size", 300, "--output", tmp_path / "t"]
    special = ["--special-tokens", "</s>", "<s>", "<mask>"]
    result = run_tokenizer(*arguments, "--split-digits", *special, "--model-max-length", 77)
    assert result.returncode == 0, result.stderr
    assert "warning: 262 tokens instead of the 300 that --vocab-size asks for" in result.stderr
    assert "corpus.jsonl:201: not JSON" in result.stdout
    tokenizer = load_tokenizer(tmp_path / "t")
    assert (tokenizer.eod_id, tokenizer.bos_id, tokenizer.pad_id) == (0, 1, 0)
    assert tokenizer.special_ids == {0, 1, 2}
    assert len(tokenizer.encode("1900")) == 4
    assert json.loads((tmp_path / "t/tokenizer_config.json").read_text())["model_max_length"] == 77

    again = run_tokenizer(*arguments)
    assert again.returncode == 2
    assert "--overwrite" in again.stderr
    info = json.loads(run_tokenizer("info", tmp_path / "t").stdout)
    assert (info["kind"], info["eod"]) == ("hugging_face", {"id": 0, "text": "</s>"})


@pytest.mark.parametrize("split_digits", [False, True])
def test_characters_with_bytes_to_fall_back_on(tmp_path: Path, split_digits: bool) -> None:
    text = "Größe und Maß der Größe: 42  Maß.\n\tGröße <0x41> Ł"
    options = BpeOptions(vocab_size=330, byte_fallback=True, split_digits=split_digits)
    save_hugging_face_folder(train_bpe(iter([[text] * 9, ["中"]]), options), options, tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert len(tokenizer.encode("ß")) == 1
    assert tokenizer.encode("文") == [2 + byte for byte in "文".encode()]
    assert len(tokenizer.encode(" 42")) == (3 if split_digits else 1)
    for anything in (text, "中文 \u2581 \U0001f600\x00", " a  b ", "<0x0A>", "".join(map(chr, range(0x3000)))):
        assert tokenizer.decode(tokenizer.encode(anything)) == anything
    assert tokenizer.encode("<|endoftext|>") == [0]
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs(text, add_special_tokens=False)["input_ids"] == tokenizer.encode(text)
    assert theirs.decode(tokenizer.encode(text)) == text


def test_what_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at least 258"):
        train_bpe(iter([["text"]]), BpeOptions(vocab_size=257))
    with pytest.raises(ConfigError, match="none twice"):
        train_bpe(iter([["text"]]), BpeOptions(vocab_size=300, special_tokens=("a", "a")))
    with pytest.raises(DataFormatError, match="no text"):
        train_bpe(iter([[""]]), BpeOptions(vocab_size=300))
    result = run_tokenizer("train", "--input", tmp_path / "none*", "--vocab-size", 300, "--output", tmp_path / "t")
    assert result.returncode == 2
    assert "matches no file" in result.stderr
    assert not (tmp_path / "t").exists()
