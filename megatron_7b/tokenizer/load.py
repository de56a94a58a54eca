"""Which kind of tokenizer a path holds. Each library is imported only when it is needed."""

from pathlib import Path
from typing import Literal

from megatron_7b.errors import DataFormatError, PathError
from megatron_7b.tokenizer.base import Tokenizer
from megatron_7b.tokenizer.byte_level import MARKER_FILE, ByteTokenizer

type TokenizerKind = Literal["hugging_face", "sentencepiece", "tiktoken", "bytes"]

_EXPECTED = (
    "expected a Hugging Face folder, tokenizer.json, a SentencePiece .model, a .tiktoken file, or the word bytes"
)


def load_tokenizer(path: str | Path, *, kind: TokenizerKind | None = None) -> Tokenizer:
    """Load a tokenizer of any kind.

    Args:
        path: A Hugging Face folder, a tokenizer.json, a SentencePiece model, a tiktoken rank file, a folder that holds
            one of these, or the word `bytes`.
        kind: Overrides what the files look like.

    Raises:
        PathError: There is nothing, or a folder without a tokenizer.
        DataFormatError: The file is no tokenizer.
    """
    path = Path(path)
    if kind == "bytes" or str(path) == "bytes":
        return ByteTokenizer()
    if not path.exists():
        raise PathError(
            f"tokenizer {path} does not exist, {_EXPECTED}",
            hint="nothing is fetched from a hub: `hf download NAME --include 'tokenizer*' --local-dir DIR` does; "
            "`megatron-7b tokenizer train` makes a new one",
        )
    file = path if path.is_file() else _find_file(path, kind)
    return _load_file(path, file, kind or _detect_kind(file))


def _find_file(folder: Path, kind: TokenizerKind | None) -> Path:
    endings = {"hugging_face": ["tokenizer.json"], "sentencepiece": ["*.model"], "tiktoken": ["*.tiktoken", "*.model"]}
    for pattern in endings.get(kind or "", ["tokenizer.json", MARKER_FILE, "*.model", "*.tiktoken"]):
        found = sorted(folder.glob(pattern))
        if len(found) > 1:
            raise DataFormatError(
                f"{folder} holds several tokenizer files: {', '.join(file.name for file in found)}",
                hint="name the file instead of the folder",
            )
        if found:
            return found[0]
    hint = None
    if any((folder / name).is_file() for name in ("vocab.json", "vocab.txt", "added_tokens.json")):
        hint = (
            f'an older Hugging Face folder: `python -c "from transformers import AutoTokenizer as T; '
            f"T.from_pretrained('{folder}').save_pretrained('DIR')\"` writes a tokenizer.json"
        )
    raise PathError(f"no tokenizer in {folder}, {_EXPECTED}", hint=hint)


def _detect_kind(file: Path) -> TokenizerKind:
    if file.name == MARKER_FILE:
        return "bytes"
    if file.suffix == ".json":
        return "hugging_face"
    with file.open("rb") as stream:
        first_line = stream.readline(4096)
    # Llama 3 ships tiktoken ranks under SentencePiece's usual name, tokenizer.model.
    fields = first_line.split()
    if file.suffix == ".tiktoken" or (len(fields) == 2 and fields[1].isdigit()):
        return "tiktoken"
    return "sentencepiece"


def _load_file(path: Path, file: Path, kind: TokenizerKind) -> Tokenizer:
    match kind:
        case "hugging_face":
            from megatron_7b.tokenizer.hugging_face import TOKENIZER_FILE, HuggingFaceTokenizer

            return HuggingFaceTokenizer(path if file.name == TOKENIZER_FILE and path.is_dir() else file)
        case "sentencepiece":
            from megatron_7b.tokenizer.sentence_piece import SentencePieceTokenizer

            return SentencePieceTokenizer(file)
        case "tiktoken":
            from megatron_7b.tokenizer.tiktoken_file import TiktokenTokenizer

            return TiktokenTokenizer(file)
        case "bytes":
            return ByteTokenizer()
