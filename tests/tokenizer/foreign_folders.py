"""Small tokenizer folders as they come from transformers, with tokens declared in every way that it reads."""

import functools
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceTrainer
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

_TEXT = [
    f"the {word} of the {number} united states, it's 12 don't I'll\n\tdef f(x): return x ** 2 naïve"
    for word in ("union", "people", "user", "law")
    for number in range(100)
]
_QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
END = "<|endoftext|>"

type Json = dict[str, Any]


@functools.cache
def _byte_level(style: str) -> str:
    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=style != "qwen2")
    steps = {
        "digits": [pre_tokenizers.Digits(individual_digits=True), byte_level],
        "qwen2": [pre_tokenizers.Split(Regex(_QWEN), "isolated"), byte_level],
    }
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps[style]) if style in steps else byte_level
    if style == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(_TEXT, trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
        special_tokens=[] if style == "qwen2" else [END],
    ))  # fmt: skip
    tokenizer.add_special_tokens([END])
    return tokenizer.to_str()


@functools.cache
def _word_pieces() -> str:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer.train_from_iterator(
        _TEXT, trainers.WordPieceTrainer(vocab_size=200, special_tokens=special, show_progress=False)
    )
    return tokenizer.to_str()


@functools.cache
def _sentence_piece(model_type: str) -> bytes:
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(_TEXT), model_writer=model, vocab_size=320 if model_type == "bpe" else 300,
        model_type=model_type, byte_fallback=True, minloglevel=2, user_defined_symbols=["<own>"],
        normalization_rule_name="identity", remove_extra_whitespaces=False, hard_vocab_limit=False,
    )  # fmt: skip
    return model.getvalue()


def vocabulary_files(kind: str) -> Mapping[str, bytes]:
    """Files of a vocabulary of a kind: `gpt2`, `digits`, `qwen2`, `bert`, `spm_bpe`, `spm_unigram`, `gpt2_files`."""
    if kind == "bert":
        return {"tokenizer.json": _word_pieces().encode()}
    if kind.startswith("spm_"):
        return {"tokenizer.model": _sentence_piece(kind.removeprefix("spm_"))}
    if kind == "gpt2_files":
        model = json.loads(_byte_level("gpt2"))["model"]
        merges = "\n".join(["#version: 0.2", *(" ".join(pair) for pair in model["merges"])]) + "\n"
        return {"vocab.json": json.dumps(model["vocab"]).encode(), "merges.txt": merges.encode()}
    if kind == "bert_files":
        vocabulary: dict[str, int] = json.loads(_word_pieces())["model"]["vocab"]
        return {"vocab.txt": ("\n".join(sorted(vocabulary, key=vocabulary.__getitem__)) + "\n").encode()}
    return {"tokenizer.json": _byte_level(kind).encode()}


def write_folder(folder: Path, kind: str, declared: Mapping[str, Json | None]) -> Path:
    """Write a vocabulary and the JSON files that are declared beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in vocabulary_files(kind).items():
        (folder / name).write_bytes(content)
    for name, values in declared.items():
        if values is not None:
            (folder / name).write_text(json.dumps(values))
    return folder
