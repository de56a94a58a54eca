"""GPT-2's and BERT's vocabulary files give the ids of transformers' and Megatron's classes, and a corpus keeps them."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import BertTokenizer, GPT2Tokenizer

from megatron_7b.data.corpus.indexed_dataset import IndexedDataset
from megatron_7b.data.corpus.manifest_reader import load_tokenizer_facts
from megatron_7b.errors import DataFormatError
from megatron_7b.tokenizer import Tokenizer, load_tokenizer
from megatron_7b.tokenizer.hugging_face import HuggingFaceTokenizer
from megatron_7b.tokenizer.probes import build_text_probes
from megatron_7b.tokenizer.vocabulary_files import VOCABULARY_TYPES, VocabularyType, open_typed_files
from tests.support.assets import asset
from tests.support.commands import run_command
from tests.tokenizer.foreign_folders import END

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BERT = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
CHINESE = "中文分词很难。\u3000東京都に住む １２３ 한국어\r\n第二行，全角！"
TEXTS = [*build_text_probes([END, *BERT, "<extra_id_7>"]), CHINESE, "".join(map(chr, range(0x3000)))]


@pytest.fixture(scope="module")
def gpt2_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = json.loads((asset("gpt2") / "tokenizer.json").read_bytes())["model"]
    folder = tmp_path_factory.mktemp("gpt2_files")
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    pairs = (pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"])
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *pairs]) + "\n")
    return folder


@pytest.fixture(scope="module")
def bert_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The uncased English vocabulary, and a cased one with the characters of CHINESE."""
    folder = tmp_path_factory.mktemp("bert_files")
    (folder / "uncased").mkdir()
    (folder / "uncased" / "vocab.txt").write_bytes((asset("minilm") / "vocab.txt").read_bytes())
    (folder / "cased").mkdir()
    words = [
        *BERT,
        *dict.fromkeys(CHINESE.split(maxsplit=1)[0]),
        "Hello",
        "hello",
        "##o",
        "the",
        "The",
        "a",
        "b",
        "1",
        "##2",
        "#",
    ]
    (folder / "cased" / "vocab.txt").write_text("\n".join(words) + "\n")
    return folder


def load_typed(kind: VocabularyType, folder: Path) -> Tokenizer:
    merges = folder / "merges.txt"
    vocabulary = folder / ("vocab.json" if merges.is_file() else "vocab.txt")
    return HuggingFaceTokenizer(open_typed_files(kind, vocabulary, merges if merges.is_file() else None, path=folder))


def assert_equal(ours: Tokenizer, theirs: "PreTrainedTokenizerFast", texts: list[str]) -> None:
    for text in texts:
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False), repr(text)
        assert ours.decode(ours.encode(text)) == theirs.decode(ours.encode(text)), repr(text)


def test_gpt2(gpt2_files: Path) -> None:
    theirs = GPT2Tokenizer.from_pretrained(gpt2_files)
    for ours in (load_tokenizer(gpt2_files), load_typed("GPT2BPETokenizer", gpt2_files)):
        assert_equal(ours, theirs, TEXTS)
        assert ours.encode(CHINESE) == load_tokenizer(asset("gpt2")).encode(CHINESE)
        assert (ours.eod_id, ours.bos_id, ours.pad_id, ours.vocab_size) == (50256, 50256, None, 50257)


@pytest.mark.parametrize("kind", VOCABULARY_TYPES[1:])
@pytest.mark.parametrize("name", ["uncased", "cased"])
def test_bert(bert_files: Path, kind: VocabularyType, name: str) -> None:
    extra = [f"<extra_id_{index}>" for index in range(100)] if kind == "BertWordPieceCase" else []
    theirs = BertTokenizer.from_pretrained(
        bert_files / name, do_lower_case=kind == "BertWordPieceLowerCase", extra_special_tokens=extra
    )
    ours = load_typed(kind, bert_files / name)
    assert_equal(ours, theirs, TEXTS)
    assert (ours.eod_id, ours.bos_id, ours.pad_id) == (theirs.sep_token_id, theirs.cls_token_id, theirs.pad_token_id)
    assert ours.vocab_size == len(theirs)


def test_the_case_of_a_lone_vocabulary_is_that_of_its_words(bert_files: Path) -> None:
    for name, lower_case in (("uncased", True), ("cased", False)):
        theirs = BertTokenizer.from_pretrained(bert_files / name, do_lower_case=lower_case)
        assert_equal(load_tokenizer(bert_files / name), theirs, TEXTS)


@given(text=st.text(), lower=st.booleans())
def test_any_text(gpt2_files: Path, bert_files: Path, text: str, lower: bool) -> None:
    pairs = _PAIRS or _PAIRS.extend(_build_pairs(gpt2_files, bert_files)) or _PAIRS
    ours, theirs = pairs[0] if not lower else pairs[1]
    assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)


_PAIRS: list[tuple[Tokenizer, "PreTrainedTokenizerFast"]] = []


def _build_pairs(gpt2_files: Path, bert_files: Path) -> list[tuple[Tokenizer, "PreTrainedTokenizerFast"]]:
    return [
        (load_tokenizer(gpt2_files), GPT2Tokenizer.from_pretrained(gpt2_files)),
        (load_tokenizer(bert_files / "uncased"), BertTokenizer.from_pretrained(bert_files / "uncased")),
    ]


@pytest.mark.parametrize("kind", VOCABULARY_TYPES)
def test_megatron_core_gives_the_same(kind: VocabularyType, gpt2_files: Path, bert_files: Path, tmp_path: Path) -> None:
    """Stock megatron-core, given a folder in place of the hub's name, which it would fetch."""
    from megatron.core.tokenizers.text.libraries.huggingface_tokenizer import HuggingFaceTokenizer as Megatrons

    is_gpt2 = kind == "GPT2BPETokenizer"
    folder = gpt2_files if is_gpt2 else bert_files / ("cased" if kind == "BertWordPieceCase" else "uncased")
    local = tmp_path / "local"
    local.mkdir()
    for file in folder.iterdir():
        (local / file.name).write_bytes(file.read_bytes())
    # What the hub says of gpt2, bert-large-cased and bert-large-uncased.
    (local / "config.json").write_text(json.dumps({"model_type": "gpt2" if is_gpt2 else "bert"}))
    (local / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": kind == "BertWordPieceLowerCase"}))
    extra = [f"<extra_id_{index}>" for index in range(100)] if kind == "BertWordPieceCase" else []
    megatrons = Megatrons(str(local), additional_special_tokens=extra, include_special_tokens=False)
    ours = load_typed(kind, folder)
    for text in filter(None, TEXTS):
        assert ours.encode(text) == megatrons.text_to_ids(text), repr(text)
    assert ours.eod_id == megatrons.eod
    assert ours.vocab_size == megatrons.vocab_size


@pytest.mark.parametrize("kind", VOCABULARY_TYPES)
@pytest.mark.parametrize("typed", [False, True])
def test_the_corpus_keeps_it(
    kind: VocabularyType, typed: bool, gpt2_files: Path, bert_files: Path, tmp_path: Path
) -> None:
    is_gpt2 = kind == "GPT2BPETokenizer"
    folder = gpt2_files if is_gpt2 else bert_files / ("cased" if kind == "BertWordPieceCase" else "uncased")
    files = ["--vocab-file", folder / "vocab.json", "--merge-file", folder / "merges.txt"]
    files = files if is_gpt2 else ["--vocab-file", folder / "vocab.txt"]
    (tmp_path / "c.jsonl").write_text(json.dumps({"text": CHINESE}) + "\n")
    prefix = tmp_path / "o"
    named = ["--tokenizer-type", kind] if typed else []
    command = ["preprocess", "--input", tmp_path / "c.jsonl", "--output-prefix", prefix, *files, *named, "--append-eod"]
    result = run_command(*command)
    assert result.returncode == 0, result.stderr
    facts = load_tokenizer_facts(f"{prefix}_text_document")
    assert facts is not None
    assert facts.path == str(tmp_path / "o_tokenizer")
    kept = load_tokenizer(facts.path)
    assert (kept.identity, kept.vocab_size, kept.eod_id) == (facts.identity, facts.vocab_size, facts.eod_id)
    expected = load_typed(kind, folder) if typed else load_tokenizer(folder)
    document = IndexedDataset(f"{prefix}_text_document").document(0).tolist()
    assert document == [*expected.encode(CHINESE), expected.eod_id]
    # Once more, as another shard or a restart would.
    again = run_command(*command)
    assert again.returncode == 0, again.stderr
    assert "nothing to do" in again.stdout
    shown = run_command("data", "show", f"{prefix}_text_document")
    assert expected.decode(document[:3]) in shown.stdout


def test_a_typed_folder_and_another_tokenizer_beside_the_corpus(gpt2_files: Path, tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_text('{"text": "a"}\n')
    command = ["preprocess", "--input", tmp_path / "c.jsonl", "--output-prefix", tmp_path / "o"]
    command += ["--tokenizer-type", "GPT2BPETokenizer", "--tokenizer-model"]
    assert run_command(*command, gpt2_files).returncode == 0
    other = tmp_path / "other"
    other.mkdir()
    (other / "vocab.json").write_text(json.dumps({"a": 0, "b": 1, "ab": 2}))
    (other / "merges.txt").write_text("a b\n")
    refused = run_command(*command[:-1], "--tokenizer-model", other, "--json-keys", "text", "--split-sentences")
    assert refused.returncode == 2
    assert "o_tokenizer holds another tokenizer" in refused.stderr
    replaced = run_command(*command, other, "--overwrite")
    assert replaced.returncode == 0, replaced.stderr
    kept = load_tokenizer(tmp_path / "o_tokenizer")
    assert (kept.encode(f"ab{END}"), kept.eod_id) == ([2, 3], 3)  # the token that it lacks is added


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ([], "no tokenizer is named; the ways to name one:"),
        (["--tokenizer-type", "GPT2BPETokenizer"], "no tokenizer is named"),
        (["--merge-file", "m.txt"], "needs the --vocab-file that belongs to it"),
        (["--vocab-file", "v.json", "--tokenizer-model", "bytes"], "name two tokenizers"),
        (["--vocab-file", "v.json"], "needs the --merge-file that belongs to it"),
        (["--vocab-file", "none.txt"], "none.txt is not a file"),
        (["--vocab-file", "v.json", "--tokenizer-type", "Llama2Tokenizer"], "is for --tokenizer-type GPT2BPETokenizer"),
        (["--vocab-file", "v.json", "--merge-file", "m.txt", "--tokenizer-type", "BertWordPieceCase"], "has no merges"),
        (["--tokenizer-model", ".", "--tokenizer-type", "GPT2BPETokenizer"], "needs vocab.json and merges.txt"),
        (["--tokenizer-model", ".", "--tokenizer-type", "BertWordPieceCase"], "needs vocab.txt, which . does not hold"),
        (["--tokenizer-type", "MultimodalTokenizer"], "only text is read"),
    ],
)
def test_options_that_do_not_say_which(tmp_path: Path, arguments: list[str], problem: str) -> None:
    (tmp_path / "c.jsonl").write_text('{"text": "a"}\n')
    for name in ("v.json", "m.txt"):
        (tmp_path / name).write_text("{}")
    named = [str(tmp_path / word) if word.endswith((".json", ".txt")) else word for word in arguments]
    result = run_command("preprocess", "--input", tmp_path / "c.jsonl", "--output-prefix", tmp_path / "o", *named)
    assert result.returncode == 2
    assert problem in result.stderr
    assert sorted(file.name for file in tmp_path.iterdir()) == ["c.jsonl", "m.txt", "v.json"]


@pytest.mark.parametrize(
    ("vocabulary", "merges", "problem"),
    [
        ('{"a": 0}', "a b\n", "do not fit each other"),
        ('{"a": "0"}', "", "is not a vocabulary"),
        ('{"a": 0}', "a b c\n", "merges.txt:1 is not a merge of two tokens"),
        ("[]", "", "expected a JSON object"),
    ],
)
def test_files_that_are_none(tmp_path: Path, vocabulary: str, merges: str, problem: str) -> None:
    (tmp_path / "vocab.json").write_text(vocabulary)
    (tmp_path / "merges.txt").write_text(merges)
    with pytest.raises(DataFormatError, match=problem):
        load_typed("GPT2BPETokenizer", tmp_path)


def test_vocabulary_files_that_are_not_gpt2s(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text('{"<s>": 0, "a": 1}')
    (tmp_path / "merges.txt").write_text("")
    with pytest.raises(DataFormatError, match=r"has no <\|endoftext\|>"):
        load_tokenizer(tmp_path)
