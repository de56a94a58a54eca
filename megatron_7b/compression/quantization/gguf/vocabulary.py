"""A tokenizer in llama.cpp's words.

llama.cpp cuts text into words by one of the ways that it has built in, which the file names. A tokenizer that cuts in
no known way is refused: every text would get other tokens than the model has learnt from.
"""

import contextlib
import json
from pathlib import Path
from typing import Any

import gguf

from megatron_7b.errors import ConfigError
from megatron_7b.tokenizer import load_tokenizer
from megatron_7b.tokenizer.chat_template import ChatTemplate

_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_WORDS = {
    _QWEN2: "qwen2",
    _QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|"): "llama-bpe",
}
"""Patterns of words, and llama.cpp's names of them."""


def write_vocabulary(writer: gguf.GGUFWriter, folder: Path, num_rows: int) -> None:
    """Write the tokenizer of a folder.

    Args:
        writer: The file.
        folder: A Hugging Face folder with tokenizer.json.
        num_rows: Of the word embedding; rows without a token get a name that no text has.

    Raises:
        ConfigError: There is no such tokenizer, it has more tokens than the embedding has rows, or it cuts text in a
            way that llama.cpp does not have.
    """
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise ConfigError(
            f"{folder} has no tokenizer.json, and that is what tokenizers of GGUF files are written from",
            hint="transformers writes it: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)",
        )
    content = json.loads(file.read_text(encoding="utf-8"))
    model = content["model"]
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        raise ConfigError(
            f"{file} is {'like SentencePiece' if model.get('byte_fallback') else model.get('type')}, expected a BPE "
            "over bytes",
            hint="llama.cpp's own converter writes other kinds of tokenizers",
        )
    name = name_of_words(content)
    if name is None:
        raise ConfigError(
            f"{file} cuts text into words in a way that llama.cpp is not known to have",
            hint="it has those of GPT-2, SmolLM, Llama 3 and Qwen 2; with another one, texts would get other tokens",
        )
    tokens = {index: token for token, index in model["vocab"].items()}
    added = {one["id"]: one for one in content.get("added_tokens", [])}
    tokens |= {index: one["content"] for index, one in added.items()}
    if max(tokens) >= num_rows:
        raise ConfigError(f"{file} has {max(tokens) + 1:,} tokens, and the word embedding has {num_rows:,} rows")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(name)
    writer.add_token_list([tokens.get(index, f"[PAD{index}]") for index in range(num_rows)])
    writer.add_token_types([_type_of(index, tokens, added) for index in range(num_rows)])
    writer.add_token_merges([one if isinstance(one, str) else " ".join(one) for one in model["merges"]])
    _write_special(writer, folder, content)


def name_of_words(content: dict[str, Any]) -> str | None:
    """Return llama.cpp's name of how a tokenizer.json cuts text into words; None if it has none."""
    steps = content.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers", [steps])
    if any(step.get("add_prefix_space") for step in steps):
        return None
    match steps:
        case [{"type": "ByteLevel"} as only] if only.get("use_regex", True):
            return "gpt-2"
        case [{"type": "Digits", "individual_digits": True}, {"type": "ByteLevel"} as last] if last.get(
            "use_regex", True
        ):
            return "smollm"
        case [{"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}, {"type": "ByteLevel"} as last]:
            return None if last.get("use_regex", True) or steps[0].get("invert") else _WORDS.get(pattern)
    return None


def _type_of(index: int, tokens: dict[int, str], added: dict[int, dict[str, Any]]) -> gguf.TokenType:
    if index not in tokens:
        return gguf.TokenType.UNUSED
    if index not in added:
        return gguf.TokenType.NORMAL
    return gguf.TokenType.CONTROL if added[index].get("special") else gguf.TokenType.USER_DEFINED


def _write_special(writer: gguf.GGUFWriter, folder: Path, content: dict[str, Any]) -> None:
    """Write which tokens begin, end and fill up texts, and the chat template."""
    tokenizer = load_tokenizer(folder)
    for token, write in (
        (tokenizer.bos_id, writer.add_bos_token_id),
        (tokenizer.eod_id, writer.add_eos_token_id),
        (tokenizer.pad_id, writer.add_pad_token_id),
    ):
        if token is not None:
            write(token)
    writer.add_add_bos_token("<bos>" in _beginning(content, tokenizer.bos_id))
    writer.add_add_eos_token(False)
    with contextlib.suppress(ConfigError):  # it has none
        if source := ChatTemplate(tokenizer).default_source:
            writer.add_chat_template(source)


def _beginning(content: dict[str, Any], bos: int | None) -> str:
    """Say whether the tokenizer itself puts the first token before a text, as `<bos>` or nothing."""
    from tokenizers import Tokenizer

    ids = Tokenizer.from_str(json.dumps(content)).encode("a").ids
    return "<bos>" if ids and ids[0] == bos and len(ids) > 1 else ""
