"""The tokenizer that a corpus names is found again, or its absence is known, and a wrong one is refused."""

from pathlib import Path

import pytest

from megatron_7b.cli.main import main
from megatron_7b.config.schema import DataConfig
from megatron_7b.data.samples.corpus_tokenizer import corpus_vocab_size, find_tokenizer, read_corpus_tokenizer
from megatron_7b.errors import ConfigError, DataFormatError


def corpus(folder: Path, name: str, tokenizer: str) -> str:
    (folder / f"{name}.jsonl").write_text('{"text": "one two"}\n{"text": "three"}\n', encoding="utf-8")
    arguments = ["--input", str(folder / f"{name}.jsonl"), "--output-prefix", str(folder / name)]
    assert main(["preprocess", *arguments, "--tokenizer-model", tokenizer, "--append-eod"]) == 0
    return str(folder / f"{name}_text_document")


def train_tokenizer(folder: Path, name: str, size: int) -> Path:
    (folder / "text.jsonl").write_text('{"text": "one two three four five six seven"}\n' * 20, encoding="utf-8")
    arguments = ["--input", str(folder / "text.jsonl"), "--vocab-size", str(size), "--output", str(folder / name)]
    assert main(["tokenizer", "train", *arguments]) == 0
    return folder / name


def test_a_relative_tokenizer_is_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train_tokenizer(tmp_path, "tok", 280)
    monkeypatch.chdir(tmp_path)
    prefix = corpus(tmp_path, "a", "tok")
    monkeypatch.chdir("/")
    tokenizer = find_tokenizer(DataConfig(train=(prefix,)))
    assert tokenizer is not None
    assert tokenizer.vocab_size == corpus_vocab_size(DataConfig(train=(prefix,)))


def test_bytes_need_no_path(tmp_path: Path) -> None:
    tokenizer = find_tokenizer(DataConfig(train=(corpus(tmp_path, "a", "bytes"),)))
    assert tokenizer is not None
    assert tokenizer.kind == "bytes"


def test_the_model_has_the_last_word(tmp_path: Path) -> None:
    folder, other = train_tokenizer(tmp_path, "tok", 280), train_tokenizer(tmp_path, "other", 270)
    data = DataConfig(train=(corpus(tmp_path, "a", str(folder)),))
    moved = folder.rename(tmp_path / "moved")
    assert find_tokenizer(data) is None
    assert find_tokenizer(data, of_model=moved) is not None
    with pytest.raises(ConfigError, match=r"the model was trained with .*other"):
        find_tokenizer(data, of_model=other)
    with pytest.raises(ConfigError, match=r"data\.tokenizer is .*moved.* trained with .*other"):
        find_tokenizer(DataConfig(tokenizer=str(moved)), of_model=other)
    assert find_tokenizer(DataConfig(), of_model=other) is not None


def test_a_wrong_one_is_refused(tmp_path: Path) -> None:
    first, second = train_tokenizer(tmp_path, "first", 280), train_tokenizer(tmp_path, "second", 270)
    a, b = corpus(tmp_path, "a", str(first)), corpus(tmp_path, "b", str(second))
    with pytest.raises(ConfigError, match="different tokenizers"):
        find_tokenizer(DataConfig(train=("0.5", a, "0.5", b)))
    with pytest.raises(ConfigError, match=r"data\.tokenizer is"):
        find_tokenizer(DataConfig(train=(a,), tokenizer=str(second)))


def test_a_corpus_without_or_with_a_broken_manifest(tmp_path: Path) -> None:
    prefix = corpus(tmp_path, "a", "bytes")
    manifest = Path(f"{prefix}.json")
    manifest.write_text("{", encoding="utf-8")
    with pytest.raises(DataFormatError, match="cannot be read"):
        read_corpus_tokenizer(prefix)
    manifest.unlink()
    assert read_corpus_tokenizer(prefix) is None
    assert find_tokenizer(DataConfig(train=(prefix,))) is None
