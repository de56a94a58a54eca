"""Whether transformers' AutoTokenizer reads a folder as this project's tokenizer does."""

from pathlib import Path

from megatron_7b.tokenizer.ask_transformers import ask_transformers
from megatron_7b.tokenizer.base import Tokenizer
from megatron_7b.tokenizer.definition import Definition
from megatron_7b.tokenizer.hugging_face import HuggingFaceTokenizer
from megatron_7b.tokenizer.probes import build_text_probes


def why_ids_differ(tokenizer: Tokenizer, folder: Path) -> str | None:
    """Return what AutoTokenizer does otherwise with a folder than a tokenizer, in words; None if nothing was found.

    Compared are probes (digits, blanks, scripts, control characters, every special token alone and glued to words), the
    and the token that ends a text, if AutoTokenizer has one.

    Args:
        tokenizer: What wrote a corpus, or trained a model.
        folder: What transformers would load.

    Raises:
        DataFormatError: Transformers cannot load the folder.
    """
    answer = ask_transformers(folder.absolute())
    theirs = HuggingFaceTokenizer(
        Definition(
            path=folder, content=answer.definition, eod_id=answer.eod_id, bos_id=answer.bos_id, pad_id=answer.pad_id,
            split_special_tokens=answer.split_special_tokens,
        )
    )  # fmt: skip
    by = f"transformers' {answer.class_name}"
    for text in build_text_probes(_matched_tokens(tokenizer)):
        expected, found = tokenizer.encode(text), theirs.encode(text)
        if found != expected:
            shown = text if len(text) <= 40 else f"{text[:40]}…"
            return f"{by} gives {_start(found)} for {shown!r}, this tokenizer {_start(expected)}"
    if answer.eod_id is not None and answer.eod_id != tokenizer.eod_id:
        return f"{by} ends a text with {answer.eod_id}, this tokenizer a document with {tokenizer.eod_id}"
    return None


def _matched_tokens(tokenizer: Tokenizer) -> list[str]:
    """Special tokens that text may spell; SentencePiece and tiktoken take such text for ordinary."""
    if tokenizer.kind != "hugging_face":
        return []
    return [name for token in sorted(tokenizer.special_ids) if (name := tokenizer.spell(token)) is not None]


def _start(ids: list[int]) -> str:
    return f"[{', '.join(map(str, ids[:8]))}{', …' if len(ids) > 8 else ''}]"
