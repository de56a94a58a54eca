"""`megatron-7b data show`, as a user runs it."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from megatron_7b.cli.commands import data
from megatron_7b.cli.main import main
from megatron_7b.data import IndexWriter
from megatron_7b.data.corpus.manifest import describe_tokenizer
from megatron_7b.errors import ConfigError, DataFormatError, PathError
from megatron_7b.tokenizer import load_tokenizer
from tests.data.corpora import write_corpus
from tests.support.assets import asset

TEXTS = ["The state of the Union is strong.", "Zwölf Boxkämpfer jagen Viktor.", "第三篇文章。"]


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    """Three documents written with GPT-2's tokenizer, without a manifest."""
    tokenizer = load_tokenizer(asset("gpt2"))
    writer = IndexWriter(str(tmp_path / "a_text_document"), 2)
    for text in TEXTS:
        writer.add_document(np.array([*tokenizer.encode(text), tokenizer.eod_id], dtype=np.int64))
    writer.finish()
    return str(tmp_path / "a")


def name_tokenizer(corpus: str, path: str, identity: str) -> None:
    """Write what of a manifest matters here."""
    facts = dataclasses.replace(describe_tokenizer(load_tokenizer(asset("gpt2"))), path=path, identity=identity)
    content = {"tokenizer": dataclasses.asdict(facts)}
    Path(f"{corpus}_text_document.json").write_text(json.dumps(content), encoding="utf-8")


def test_text_and_statistics(corpus: str, capsys: pytest.CaptureFixture[str]) -> None:
    name_tokenizer(corpus, str(asset("gpt2")), load_tokenizer(asset("gpt2")).identity)
    assert data.main(["show", corpus]) == 0
    output = capsys.readouterr()
    for text in TEXTS:
        assert text in output.out
    assert "documents       3 (0 of them empty)" in output.out
    assert "50,256" in output.out
    assert output.err == ""


def test_json(corpus: str, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = load_tokenizer(asset("gpt2"))
    flags = ["--first", "1", "--documents", "5", "--tokenizer", str(asset("gpt2"))]
    assert data.main(["show", corpus, "--json", *flags]) == 0
    shown = json.loads(capsys.readouterr().out)
    lengths = [len(tokenizer.encode(text)) + 1 for text in TEXTS]
    assert [document["ids"][:-1] for document in shown["shown"]] == [tokenizer.encode(text) for text in TEXTS[1:]]
    assert shown["documents"] == 3
    assert shown["tokens"] == sum(lengths)
    assert (shown["min_length"], shown["median_length"], shown["max_length"]) == (
        min(lengths),
        sorted(lengths)[1],
        max(lengths),
    )
    assert shown["dtype"] == "uint16"
    assert shown["bin_bytes"] == 2 * sum(lengths)
    assert shown["max_id"] == tokenizer.eod_id


def test_ids_where_no_tokenizer_is_known(corpus: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert data.main(["show", corpus]) == 0
    output = capsys.readouterr()
    assert " 50256" in output.out
    assert "--tokenizer" in output.err
    name_tokenizer(corpus, "/absent/tokenizer", "another")
    assert data.main(["show", corpus]) == 0
    assert "/absent/tokenizer" in capsys.readouterr().err


def test_another_tokenizer_is_noted(corpus: str, capsys: pytest.CaptureFixture[str]) -> None:
    name_tokenizer(corpus, str(asset("gpt2")), "another")
    assert data.main(["show", corpus]) == 0
    assert "not the tokenizer that wrote" in capsys.readouterr().err
    assert data.main(["show", corpus, "--tokenizer", "bytes"]) == 0
    assert "largest id is 50256" in capsys.readouterr().err


def test_mistakes(corpus: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--documents is -1"):
        data.main(["show", corpus, "--documents", "-1"])
    with pytest.raises(ConfigError, match="--first is 3, expected 0 to 2"):
        data.main(["show", corpus, "--first", "3"])
    with pytest.raises(PathError, match="corpora in that folder: .*/a_text_document"):
        data.main(["show", str(tmp_path)])
    assert data.main(["show", f"{corpus}_text_document.json", "--tokenizer", "bytes"]) == 0
    with pytest.raises(PathError, match="absent"):
        data.main(["show", str(tmp_path / "absent")])
    Path(f"{corpus}_text_document.json").write_text("[1]", encoding="utf-8")
    with pytest.raises(DataFormatError, match=r"_text_document\.json cannot be read: it is \[1\], expected an object"):
        data.main(["show", corpus])


def test_an_empty_corpus(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert data.main(["show", write_corpus(tmp_path / "a", [])]) == 0
    assert "min -, median -, max -" in capsys.readouterr().out


def test_a_corpus_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "show", "/absent/corpus"]) == 2
    assert "error: no corpus at /absent/corpus" in capsys.readouterr().err
