"""`megatron-7b data adopt`: a manifest for a corpus without one."""

import json
from pathlib import Path

import numpy as np
import pytest

from megatron_7b.cli.commands import data, preprocess
from megatron_7b.data.corpus.indexed_dataset import IndexedDataset
from megatron_7b.data.corpus.scan import count_empty_documents
from megatron_7b.errors import ConfigError, DataFormatError
from megatron_7b.tokenizer import load_tokenizer
from tests.data.corpora import random_documents, write_corpus
from tests.support.assets import asset


def test_it_says_what_preprocessing_would(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "a.jsonl"
    text.write_text("".join(json.dumps({"text": one}) + "\n" for one in ("Grüße", "", "zwei\n", "drei")))
    preprocess.main(["--input", str(text), "--output-prefix", str(tmp_path / "a"), "--tokenizer-model", "bytes"])
    file = tmp_path / "a_text_document.json"
    written = json.loads(file.read_text())
    file.unlink()
    assert data.main(["adopt", str(tmp_path / "a"), "--tokenizer", "bytes"]) == 0
    adopted = json.loads(file.read_text())
    for name in ("tokenizer", "counts", "token_bytes", "bin", "idx", "format_version", "version"):
        assert adopted[name] == written[name], name
    assert adopted["sources"] == []
    assert adopted["counts"]["empty_documents"] == 1
    capsys.readouterr()
    assert data.main(["verify", str(tmp_path / "a")]) == 0


def test_the_tokenizer_is_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = asset("gpt2").resolve()
    prefix = write_corpus(tmp_path / "a", [[1, 50256]])
    monkeypatch.chdir(folder.parent)
    data.main(["adopt", prefix, "--tokenizer", folder.name])
    tokenizer = json.loads(Path(f"{prefix}.json").read_text())["tokenizer"]
    assert tokenizer["path"] == str(folder)
    assert tokenizer["identity"] == load_tokenizer(folder).identity


def test_ids_beyond_the_vocabulary_are_refused(tmp_path: Path) -> None:
    prefix = write_corpus(tmp_path / "a", [[1], [2, 300]])
    with pytest.raises(DataFormatError, match="1 ids outside of 0 to .* the first is 300, token 2, in document 1"):
        data.main(["adopt", prefix, "--tokenizer", "bytes"])
    assert not list(tmp_path.glob("*.json*"))


def test_a_manifest_is_not_overwritten_unasked(tmp_path: Path) -> None:
    prefix = write_corpus(tmp_path / "a", [[1]])
    file = Path(f"{prefix}.json")
    file.write_text("mine")
    with pytest.raises(ConfigError, match="--overwrite"):
        data.main(["adopt", prefix, "--tokenizer", "bytes"])
    assert file.read_text() == "mine"
    assert data.main(["adopt", prefix, "--tokenizer", "bytes", "--overwrite"]) == 0
    assert json.loads(file.read_text())["counts"]["tokens"] == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "a.idx", "a.json"]


def test_a_damaged_corpus_and_foreign_types_are_refused(tmp_path: Path) -> None:
    prefix = write_corpus(tmp_path / "a", [[1, 2]])
    index = Path(f"{prefix}.idx")
    content = bytearray(index.read_bytes())
    content[17] = 5  # Megatron's code of int64.
    content[34:38] = (1).to_bytes(4, "little")
    index.write_bytes(content)
    Path(f"{prefix}.bin").write_bytes(bytes(8))
    with pytest.raises(DataFormatError, match="int64, expected uint16 or int32"):
        data.main(["adopt", prefix, "--tokenizer", "bytes"])
    Path(f"{prefix}.bin").write_bytes(bytes(7))
    with pytest.raises(DataFormatError, match="7 bytes long"):
        data.main(["adopt", prefix, "--tokenizer", "bytes"])
    assert not Path(f"{prefix}.json").exists()


def test_an_empty_corpus(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prefix = write_corpus(tmp_path / "a", [])
    assert data.main(["adopt", prefix, "--tokenizer", "bytes"]) == 0
    assert "no ids" in capsys.readouterr().out
    assert data.main(["verify", prefix]) == 0


def test_empty_documents_are_counted_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = random_documents(5, 100, max_length=3)
    dataset = IndexedDataset(write_corpus(tmp_path / "a", documents))
    monkeypatch.setattr("megatron_7b.data.corpus.scan._DOCUMENTS_AT_ONCE", 7)
    assert count_empty_documents(dataset) == sum(not document for document in documents)
    assert count_empty_documents(dataset) == np.count_nonzero(dataset.document_lengths() == 0) > 0
