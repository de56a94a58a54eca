"""Which kind of tokenizer a path holds. Each library is imported only when it is needed."""

from pathlib import Path
from typing import Literal

from megatron_7b.errors import DataFormatError, PathError
from megatron_7b.tokenizer.base import Tokenizer
from megatron_7b.tokenizer.byte_level import MARKER_FILE, ByteTokenizer
from megatron_7b.tokenizer.definition import check_was_fetched

type TokenizerKind = Literal["hugging_face", "sentencepiece", "tiktoken", "bytes"]

_EXPECTED = (
    "expected a Hugging Face folder, tokenizer.json, a SentencePiece .model, a .tiktoken file, a folder of vocab.json "
    "and merges.txt or of vocab.txt, or the word bytes"
)
_VOCABULARIES = ("*.model", "*.tiktoken", "vocab.json", "vocab.txt", "merges.txt", "tekken.json")


def load_tokenizer(path: str | Path, *, kind: TokenizerKind | None = None) -> Tokenizer:
    """Load a tokenizer of any kind.

    Args:
        path: A Hugging Face folder, a tokenizer.json, a SentencePiece model, a tiktoken rank file, a folder that holds
            one of these or GPT-2's or BERT's vocabulary files, or the word `bytes`. What a Hugging Face folder declares
            beside a SentencePiece model or rank file counts only if the folder is named, not the file.
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
    if path.is_file():
        return _load_file(path, kind or _detect_kind(path))
    return _load_folder(path, kind)


def _load_folder(folder: Path, kind: TokenizerKind | None) -> Tokenizer:
    """Load a folder: a Hugging Face one if it has a tokenizer.json or what transformers declares a tokenizer by."""
    # An export of our byte tokenizer has a tokenizer.json too, for other readers.
    if kind == "hugging_face" or (kind is None and not (folder / MARKER_FILE).is_file()):
        from megatron_7b.tokenizer.hf_folder import is_hugging_face_folder, open_other_files, open_tokenizer_json
        from megatron_7b.tokenizer.hugging_face import HuggingFaceTokenizer
        from megatron_7b.tokenizer.vocabulary_files import open_vocabulary_folder

        if (folder / "tokenizer.json").is_file():
            return HuggingFaceTokenizer(open_tokenizer_json(folder))
        for model in folder.glob("*.model"):  # an empty one is a vocabulary of three for transformers
            check_was_fetched(model)
        if _has_vocabulary(folder) and is_hugging_face_folder(folder):
            return HuggingFaceTokenizer(open_other_files(folder))
        if (definition := open_vocabulary_folder(folder)) is not None:
            return HuggingFaceTokenizer(definition)
    file = _find_file(folder, kind)
    return _load_file(file, kind or _detect_kind(file))


def _has_vocabulary(folder: Path) -> bool:
    return any(next(folder.glob(pattern), None) is not None for pattern in _VOCABULARIES)


def _find_file(folder: Path, kind: TokenizerKind | None) -> Path:
    endings = {"hugging_face": ["tokenizer.json"], "sentencepiece": ["*.model"], "tiktoken": ["*.tiktoken", "*.model"]}
    for pattern in endings.get(kind or "", [MARKER_FILE, "*.model", "*.tiktoken"]):
        found = sorted(folder.glob(pattern))
        if len(found) > 1:
            raise DataFormatError(
                f"{folder} holds several tokenizer files: {', '.join(file.name for file in found)}",
                hint="name the file instead of the folder",
            )
        if found:
            return found[0]
    raise PathError(f"no tokenizer in {folder}, {_EXPECTED}")


def _detect_kind(file: Path) -> TokenizerKind:
    if file.name == MARKER_FILE:
        return "bytes"
    if file.suffix == ".json":
        return "hugging_face"
    check_was_fetched(file)
    with file.open("rb") as stream:
        first_line = stream.readline(4096)
    # Llama 3 ships tiktoken ranks under SentencePiece's usual name, tokenizer.model.
    fields = first_line.split()
    if file.suffix == ".tiktoken" or (len(fields) == 2 and fields[1].isdigit()):
        return "tiktoken"
    return "sentencepiece"


def _load_file(file: Path, kind: TokenizerKind) -> Tokenizer:
    match kind:
        case "hugging_face":
            from megatron_7b.tokenizer.hf_folder import open_tokenizer_json
            from megatron_7b.tokenizer.hugging_face import HuggingFaceTokenizer

            return HuggingFaceTokenizer(open_tokenizer_json(file))
        case "sentencepiece":
            from megatron_7b.tokenizer.sentence_piece import SentencePieceTokenizer

            return SentencePieceTokenizer(file)
        case "tiktoken":
            from megatron_7b.tokenizer.tiktoken_file import TiktokenTokenizer

            return TiktokenTokenizer(file)
        case "bytes":
            return ByteTokenizer()
