"""Tokenizer files are carried as they are, and transformers is told to run them as they stand."""

import json
import shutil
from pathlib import Path

import pytest
from sentencepiece import SentencePieceTrainer
from transformers import AutoTokenizer

from megatron_7b.conversion.families import FAMILIES
from megatron_7b.conversion.hf_tokenizer import copy_tokenizer, give_back_tokenizer, transformers_ids
from megatron_7b.conversion.json_files import write_json
from megatron_7b.errors import ConversionError
from megatron_7b.tokenizer import load_tokenizer
from tests.conversion.tiny_models import save_foreign_tokenizer, save_tiny_tokenizer

TEXTS = [
    "Hello  world, it's 1234567 o'clock – naïve café\n\n\tdef f(x):\r\n        return x ** 2  # {}\n",
    " 漢字かな交じり文 🙂👩‍👩‍👧 Привет, \u0041\u030a \u00a0\u3000end ",
    "1 2 3 4 5 the cat's 1234 naps",
    "the<|end|> cat <|pad|><|pad|>",
]


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


FAMILY_CLASSES = [None, "LlamaTokenizerFast", "Qwen2Tokenizer", "GPT2Tokenizer", "PreTrainedTokenizerFast"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("named", FAMILY_CLASSES)
def test_every_family_keeps_the_ids_whatever_class_is_named(family: str, named: str | None, tmp_path: Path):
    carried, folder = tmp_path / "carried", tmp_path / "folder"
    save_tiny_tokenizer(carried)
    settings = json.loads((carried / "tokenizer_config.json").read_text()) | {"tokenizer_class": named}
    write_json(carried / "tokenizer_config.json", {key: value for key, value in settings.items() if value is not None})
    folder.mkdir()
    write_json(folder / "config.json", {"model_type": family})
    assert give_back_tokenizer(carried, folder, model_max_length=None)
    ours = load_tokenizer(carried).encode_batch(TEXTS)
    theirs = AutoTokenizer.from_pretrained(folder)
    assert [theirs.encode(text, add_special_tokens=False) for text in TEXTS] == ours
    assert theirs.eos_token_id == load_tokenizer(carried).eod_id
    lone = load_tokenizer(shutil.copy(carried / "tokenizer.json", tmp_path / "lone.json"))
    if (lone.encode_batch(TEXTS), lone.vocab_size) == (ours, load_tokenizer(carried).vocab_size):  # else it was rebuilt
        assert (folder / "tokenizer.json").read_bytes() == (carried / "tokenizer.json").read_bytes()
    written = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["tokenizer_class"]
    assert settings.items() <= written.items()


@pytest.mark.parametrize("family", FAMILIES)
def test_settings_that_keep_the_ids_stay_byte_for_byte(family: str, tmp_path: Path):
    carried, folder = tmp_path / "carried", tmp_path / "folder"
    save_tiny_tokenizer(carried)
    folder.mkdir()
    write_json(folder / "config.json", {"model_type": family})
    assert give_back_tokenizer(carried, folder, model_max_length=None)
    before, after = ((place / "tokenizer_config.json").read_bytes() for place in (carried, folder))
    assert (before == after) == (family != "qwen2")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["bytes", "bpe", "unigram", "tiktoken"])
def test_tokenizers_of_other_kinds_keep_their_ids_too(kind: str, family: str, tmp_path: Path):
    carried, folder = tmp_path / "carried", tmp_path / "folder"
    save_foreign_tokenizer(kind, carried)
    folder.mkdir()
    write_json(folder / "config.json", {"model_type": family})
    assert give_back_tokenizer(carried, folder, model_max_length=77)
    ours, theirs = load_tokenizer(carried), AutoTokenizer.from_pretrained(folder)
    texts = [text for text in TEXTS if "<|" not in text]
    assert [theirs.encode(text, add_special_tokens=False) for text in texts] == ours.encode_batch(texts)
    assert theirs.model_max_length == 77
    assert theirs.eos_token_id == ours.eod_id
    # What comes back from the folder is the same tokenizer.
    (tmp_path / "again").mkdir()
    assert copy_tokenizer(folder, tmp_path / "again")
    assert load_tokenizer(tmp_path / "again").encode_batch(texts) == ours.encode_batch(texts)


def test_a_setting_that_spells_special_tokens_out_is_given_back(tmp_path: Path):
    carried, folder = tmp_path / "carried", tmp_path / "folder"
    save_tiny_tokenizer(carried)
    folder.mkdir()
    write_json(folder / "config.json", {"model_type": "llama"})
    settings = json.loads((carried / "tokenizer_config.json").read_text())
    write_json(carried / "tokenizer_config.json", {**settings, "split_special_tokens": True})
    ours = load_tokenizer(carried)
    assert ours.encode("<|end|>") != [0]
    assert give_back_tokenizer(carried, folder, model_max_length=None)
    theirs = AutoTokenizer.from_pretrained(folder)
    assert [theirs.encode(text, add_special_tokens=False) for text in TEXTS] == ours.encode_batch(TEXTS)


def test_where_no_form_keeps_the_ids_it_is_said(tmp_path: Path):
    """SentencePiece with blanks at the ends of words, a rule that transformers does not convert."""
    carried, folder = tmp_path / "carried", tmp_path / "folder"
    carried.mkdir()
    texts = ["the cat sat on the mat, the cat's 12 o'clock 123 nap"] * 20
    SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_prefix=str(carried / "tokenizer"), vocab_size=300, model_type="bpe",
        byte_fallback=True, minloglevel=2, treat_whitespace_as_suffix=True,
    )  # fmt: skip
    (carried / "tokenizer.vocab").unlink()
    folder.mkdir()
    write_json(folder / "config.json", {"model_type": "llama"})
    assert not give_back_tokenizer(carried, folder, model_max_length=None)


def test_what_transformers_cannot_load_is_said(tmp_path: Path):
    with pytest.raises(ConversionError, match="transformers cannot load the tokenizer"):
        transformers_ids(tmp_path, [])
