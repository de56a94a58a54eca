"""Every kind of tokenizer behind the one protocol: ids of its own library, roles, identity, lossless saving."""

import base64
import io
import json
import shutil
from pathlib import Path

import pytest
import tiktoken
import tokenizers
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from megatron_7b.errors import DataFormatError, PathError
from megatron_7b.tokenizer import SpecialRole, load_tokenizer
from tests.support.assets import asset

TEXT = "Fellow-citizens, it's 1790:\n\tnaïve 東京 \U0001f600 <|endoftext|>  \x00end "


@pytest.fixture(scope="module")
def sentencepiece_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("sentencepiece") / "tokenizer.model"
    model = io.BytesIO()
    sentences = [f"the {word} of the {number} united states" for word in ("union", "people") for number in range(300)]
    SentencePieceTrainer.train(
        sentence_iterator=iter(sentences), model_writer=model, vocab_size=320, model_type="bpe", byte_fallback=True,
        minloglevel=2,
    )  # fmt: skip
    file.write_bytes(model.getvalue())
    return file


def write_ranks(file: Path, merges: tuple[bytes, ...] = (b"th", b"the", b" the")) -> Path:
    tokens = [bytes([value]) for value in range(256)] + list(merges)
    file.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)))
    return file


@pytest.mark.parametrize("name", ["gpt2", "smollm2-135m", "minilm"])
def test_hugging_face_gives_the_ids_of_tokenizers(name: str) -> None:
    folder = asset(name)
    tokenizer = load_tokenizer(folder)
    reference = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    reference.no_truncation()
    reference.no_padding()
    long_text = TEXT * 200  # beyond minilm's truncation at 128
    assert tokenizer.encode(long_text) == reference.encode(long_text, add_special_tokens=False).ids
    assert tokenizer.encode_batch([TEXT, "", long_text]) == [tokenizer.encode(text) for text in (TEXT, "", long_text)]
    assert tokenizer.vocab_size == max(reference.get_vocab(with_added_tokens=True).values()) + 1


def test_roles_come_from_the_settings_beside_it() -> None:
    gpt2, smollm2 = load_tokenizer(asset("gpt2")), load_tokenizer(asset("smollm2-135m"))
    assert (gpt2.eod_id, gpt2.bos_id, gpt2.pad_id) == (50256, 50256, None)
    assert smollm2.eod_id == smollm2.pad_id == smollm2.encode("<|im_end|>")[0]
    assert gpt2.decode(gpt2.encode(TEXT)) == TEXT


ENCODER_ROLES: tuple[SpecialRole, ...] = ("mask", "cls", "sep", "pad")


def test_encoders_find_their_tokens_as_transformers_does(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = asset("minilm")
    theirs = AutoTokenizer.from_pretrained(folder)
    expected = [getattr(theirs, f"{role}_token_id") for role in ENCODER_ROLES]
    tokenizer = load_tokenizer(folder)
    tokenizer.save(tmp_path / "saved")
    shutil.copy(folder / "tokenizer.json", tmp_path / "lone.json")
    (tmp_path / "words").mkdir()
    shutil.copy(folder / "vocab.txt", tmp_path / "words" / "vocab.txt")
    for same in (tokenizer, *map(load_tokenizer, (tmp_path / "saved", tmp_path / "lone.json", tmp_path / "words"))):
        assert [same.special_id(role) for role in ENCODER_ROLES] == expected
    assert [load_tokenizer(asset("gpt2")).special_id(role) for role in ENCODER_ROLES] == [None] * 4


def test_settings_may_call_the_tokens_of_encoders_anything(tmp_path: Path) -> None:
    names = {"mask_token": "<hidden>", "cls_token": {"content": "<s>"}, "sep_token": "</s>", "pad_token": "<fill>"}
    vocabulary = {name: index for index, name in enumerate(("a", "b", "<fill>", "</s>", "<s>", "<hidden>", "[MASK]"))}
    added = [
        {
            "id": vocabulary[name], "content": name, "special": True, "single_word": False, "lstrip": False,
            "rstrip": False, "normalized": False,
        }
        for name in list(vocabulary)[2:]
    ]  # fmt: skip
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "a"}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": model, "added_tokens": added}))
    assert [load_tokenizer(tmp_path).special_id(role) for role in ENCODER_ROLES] == [6, 4, 3, None]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **names}))
    assert [load_tokenizer(tmp_path).special_id(role) for role in ENCODER_ROLES] == [5, 4, 3, 2]
    load_tokenizer(tmp_path).save(tmp_path / "saved")
    assert [load_tokenizer(tmp_path / "saved").special_id(role) for role in ENCODER_ROLES] == [5, 4, 3, 2]


def test_tokens_of_encoders_in_other_kinds(tmp_path: Path, sentencepiece_file: Path) -> None:
    sentencepiece = load_tokenizer(sentencepiece_file)
    assert [sentencepiece.special_id(role) for role in ENCODER_ROLES] == [None, 1, 2, None]
    file = write_ranks(tmp_path / "x.tiktoken")
    special = {"<mask>": 300, "[CLS]": 301, "[SEP]": 302, "<end>": 303}
    Path(f"{file}.json").write_text(json.dumps({"pattern": "x", "special_tokens": special, "pad_token": "<end>"}))
    assert [load_tokenizer(file).special_id(role) for role in ENCODER_ROLES] == [300, 301, 302, 303]
    assert [load_tokenizer("bytes").special_id(role) for role in ENCODER_ROLES] == [None, None, None, 258]


def test_a_lone_tokenizer_json_ends_documents_with_its_usual_token(tmp_path: Path) -> None:
    file = tmp_path / "lone.json"
    file.write_bytes((asset("gpt2") / "tokenizer.json").read_bytes())
    assert load_tokenizer(file).eod_id == 50256


def test_special_tokens_given_as_objects(tmp_path: Path) -> None:
    load_tokenizer(asset("gpt2")).save(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": {"content": "!", "lstrip": false}}')
    assert load_tokenizer(tmp_path).eod_id == load_tokenizer(asset("gpt2")).encode("!")[0]


def test_identity_is_blind_to_formatting_and_sees_content(tmp_path: Path) -> None:
    original = load_tokenizer(asset("gpt2"))
    original.save(tmp_path)
    file = tmp_path / "tokenizer.json"
    definition = json.loads(file.read_text())
    file.write_text(json.dumps(definition, indent=7) + "\n")
    assert load_tokenizer(tmp_path).identity == original.identity
    definition["model"]["merges"].pop()
    file.write_text(json.dumps(definition))
    assert load_tokenizer(tmp_path).identity != original.identity


def test_sentencepiece(sentencepiece_file: Path) -> None:
    tokenizer = load_tokenizer(sentencepiece_file.parent)
    reference = SentencePieceProcessor(model_file=str(sentencepiece_file))
    assert tokenizer.kind == "sentencepiece"
    assert tokenizer.encode(TEXT) == reference.encode(TEXT)
    assert tokenizer.encode_batch([TEXT, ""]) == [reference.encode(TEXT), []]
    assert (tokenizer.bos_id, tokenizer.eod_id, tokenizer.pad_id) == (1, 2, None)
    assert tokenizer.special_ids == {1, 2}
    assert tokenizer.vocab_size == 320


@pytest.mark.parametrize("name", ["ranks.tiktoken", "tokenizer.model"])
def test_tiktoken_is_known_by_its_content(tmp_path: Path, name: str) -> None:
    tokenizer = load_tokenizer(write_ranks(tmp_path / name))
    assert tokenizer.kind == "tiktoken"
    assert tokenizer.encode("the other") == [257, 32, 111, 257, 114]
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert (tokenizer.eod_id, tokenizer.vocab_size) == (259, 260)
    assert tokenizer.decode([259]) == "<|endoftext|>"


def test_tiktoken_settings_beside_it(tmp_path: Path) -> None:
    file = write_ranks(tmp_path / "ranks.tiktoken")
    settings = {"pattern": r"\S+|\s+", "special_tokens": {"<end>": 300, "<pad>": 301}, "eod_token": "<end>"}
    (tmp_path / "ranks.tiktoken.json").write_text(json.dumps(settings))
    tokenizer = load_tokenizer(file)
    ranks = {base64.b64decode(line.split()[0]): int(line.split()[1]) for line in file.read_bytes().splitlines()}
    reference = tiktoken.Encoding(
        "x", pat_str=settings["pattern"], mergeable_ranks=ranks, special_tokens=settings["special_tokens"]
    )
    assert tokenizer.encode(TEXT) == reference.encode_ordinary(TEXT)
    assert (tokenizer.eod_id, tokenizer.vocab_size, tokenizer.special_ids) == (300, 302, {300, 301})


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ('{"eod_token": "<x>"}', "eod_token is '<x>'"),
        ('{"special_tokens": {"<x>": 7}}', "already use"),
        ('{"patern": "."}', "unknown keys"),
        ('{"pattern": "("}', "pattern"),
        ("[]", "not a settings file"),
    ],
)
def test_tiktoken_settings_that_cannot_be(tmp_path: Path, settings: str, problem: str) -> None:
    file = write_ranks(tmp_path / "ranks.tiktoken")
    (tmp_path / "ranks.tiktoken.json").write_text(settings)
    with pytest.raises(DataFormatError, match=problem):
        load_tokenizer(file)


def test_bytes() -> None:
    tokenizer = load_tokenizer("bytes")
    assert tokenizer.encode("aé") == [97, 195, 169]
    assert tokenizer.decode([*tokenizer.encode(TEXT), 256]) == TEXT
    assert (tokenizer.vocab_size, tokenizer.eod_id) == (259, 256)


def test_saving_keeps_the_identity(tmp_path: Path, sentencepiece_file: Path) -> None:
    ranks = write_ranks(tmp_path / "cl100k_base.tiktoken")  # its settings come from its name, which saving changes
    (tmp_path / "folder").mkdir()
    for index, path in enumerate([asset("gpt2"), asset("smollm2-135m"), sentencepiece_file, ranks, "bytes"]):
        original = load_tokenizer(path)
        folder = tmp_path / f"saved_{index}"
        original.save(folder)
        loaded = load_tokenizer(folder)
        loaded.save(folder)  # onto itself: must not empty the files
        again = load_tokenizer(folder)
        assert loaded.identity == again.identity == original.identity
        assert (again.kind, again.vocab_size, again.eod_id) == (original.kind, original.vocab_size, original.eod_id)
        assert again.encode(TEXT) == original.encode(TEXT)


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("tokenizer.json", b"{", "is not JSON"),
        ("tokenizer.json", b"[]", "expected a JSON object"),
        ("tokenizer.json", b"{}", "no model"),
        ("tokenizer.json", b'{"model": {"type": "New", "vocab": {}}}', "cannot|not a tokenizer"),
        ("tokenizer.model", b"\x00\x01 nonsense", "not a SentencePiece model"),
        ("a.tiktoken", b"IQ== 0\nnonsense\n", r"a.tiktoken:2"),
        ("a.tiktoken", b"IQ== 0\n", "single bytes"),
        ("tokenizer.model", b"", "tokenizer.model is empty"),
        ("tokenizer.json", b"", "tokenizer.json is empty"),
        ("tokenizer.json", b"version https://git-lfs.github.com/spec/v1\noid", "a pointer of Git LFS"),
        ("tokenizer.model", b"version https://git-lfs.github.com/spec/v1\noid", "a pointer of Git LFS"),
        ("README.md", b"", "no tokenizer in"),
        ("vocab.txt", b"[PAD]\n", r"vocab.txt lacks \[UNK\]"),
        ("vocab.txt", b"\xff\n", "vocab.txt is not UTF-8"),
        ("vocab.json", b"{}", "but no merges.txt"),
    ],
)
def test_what_is_no_tokenizer(tmp_path: Path, name: str, content: bytes, problem: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises((DataFormatError, PathError), match=problem):
        load_tokenizer(tmp_path).encode("x")


def test_an_empty_model_beside_settings(tmp_path: Path) -> None:
    """transformers takes an empty SentencePiece model for a vocabulary of three, in which every text is unknown."""
    (tmp_path / "tokenizer.model").touch()
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    with pytest.raises(DataFormatError, match=r"tokenizer\.model is empty"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("dropout", [0.1, 0.0, None])
def test_words_are_not_split_at_random(tmp_path: Path, dropout: float | None) -> None:
    vocabulary = {character: index for index, character in enumerate("abc")} | {"ab": 3}
    model = {"type": "BPE", "dropout": dropout, "vocab": vocabulary, "merges": [["a", "b"]]}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))
    if not dropout:
        assert load_tokenizer(tmp_path).encode("abc") == [3, 2]
        return
    with pytest.raises(DataFormatError, match="at random"):
        load_tokenizer(tmp_path)


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(PathError, match="does not exist"):
        load_tokenizer(tmp_path / "nothing")
    write_ranks(tmp_path / "a.tiktoken")
    write_ranks(tmp_path / "b.tiktoken")
    with pytest.raises(DataFormatError, match=r"a\.tiktoken, b\.tiktoken"):
        load_tokenizer(tmp_path)
