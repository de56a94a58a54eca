"""The vocabulary files of GPT-2 (`vocab.json`, `merges.txt`) and BERT (`vocab.txt`), which Megatron-LM's users have.

Source: transformers' GPT2Tokenizer and BertTokenizer, which Megatron-LM builds from these files too.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from megatron_7b.errors import DataFormatError
from megatron_7b.tokenizer.definition import Definition, find_token, read_object

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

type VocabularyType = Literal["GPT2BPETokenizer", "BertWordPieceLowerCase", "BertWordPieceCase"]
"""Megatron-LM's names."""

VOCABULARY_TYPES: tuple[VocabularyType, ...] = ("GPT2BPETokenizer", "BertWordPieceLowerCase", "BertWordPieceCase")
_BPE_FILES = ("vocab.json", "merges.txt")
_WORD_PIECE_FILE = "vocab.txt"
_END_OF_TEXT = "<|endoftext|>"
_BERT_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_NUM_EXTRA_IDS = 100
_AS_IT_STANDS = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}


def open_vocabulary_folder(folder: Path) -> Definition | None:
    """Read vocab.json and merges.txt, or vocab.txt, of a folder that says nothing else; None if it has neither.

    Raises:
        DataFormatError: Half of the files are there, or their kind cannot be told from them.
    """
    vocabulary, merges, words = (folder / name for name in (*_BPE_FILES, _WORD_PIECE_FILE))
    if vocabulary.is_file() and merges.is_file():
        return open_untyped_files(vocabulary, merges, path=folder)
    if words.is_file():
        return open_untyped_files(words, None, path=folder)
    if vocabulary.is_file() or merges.is_file():
        there, missing = _BPE_FILES if vocabulary.is_file() else reversed(_BPE_FILES)
        raise DataFormatError(f"{folder} has {there}, but no {missing}", hint="both make GPT-2's tokenizer")
    return None


def open_untyped_files(vocabulary: Path, merges: Path | None, *, path: Path) -> Definition:
    """Read GPT-2's files if there are merges, else BERT's, in small letters only if its vocabulary has no others.

    Args:
        vocabulary: vocab.json or vocab.txt.
        merges: merges.txt.
        path: Where the tokenizer will be found later.

    Raises:
        DataFormatError: A file is missing or is not what it should be, or the vocabulary is not GPT-2's.
    """
    if merges is None:
        if vocabulary.suffix == ".json":
            raise DataFormatError(f"{vocabulary} needs the merges.txt that belongs to it", hint="give --merge-file")
        is_cased = any(word != word.lower() for word in _read_words(vocabulary) if word not in _BERT_TOKENS)
        return open_bert_file(vocabulary, path=path, lower_case=not is_cased)
    if _END_OF_TEXT not in _read_vocabulary(vocabulary):
        raise DataFormatError(
            f"{vocabulary} has no {_END_OF_TEXT}, so that it is not GPT-2's, and nothing there says whose it is",
            hint="--tokenizer-type GPT2BPETokenizer takes it as GPT-2's and adds that token",
        )
    return open_gpt2_files(vocabulary, merges, path=path)


def open_typed_files(kind: VocabularyType, vocabulary: Path, merges: Path | None, *, path: Path) -> Definition:
    """Read vocabulary files as Megatron-LM's `--tokenizer-type` of that name does.

    Args:
        kind: The type.
        vocabulary: vocab.json or vocab.txt.
        merges: merges.txt, for GPT2BPETokenizer.
        path: Where the tokenizer will be found later.

    Raises:
        DataFormatError: A file is missing or is not what it should be.
    """
    if kind == "GPT2BPETokenizer":
        if merges is None:
            raise DataFormatError("GPT2BPETokenizer needs a merges.txt beside its vocab.json", hint="give --merge-file")
        return open_gpt2_files(vocabulary, merges, path=path)
    extra = [f"<extra_id_{index}>" for index in range(_NUM_EXTRA_IDS)] if kind == "BertWordPieceCase" else []
    return open_bert_file(vocabulary, path=path, lower_case=kind == "BertWordPieceLowerCase", extra_tokens=extra)


def open_gpt2_files(vocabulary: Path, merges: Path, *, path: Path) -> Definition:
    """Build GPT-2's byte-level BPE; <|endoftext|> ends a document, and is added if the vocabulary lacks it.

    Raises:
        DataFormatError: A file is missing or is not what it should be, or a merge makes a token that has no id.
    """
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers

    ids, pairs = _read_vocabulary(vocabulary), _read_merges(merges)
    try:
        model = models.BPE(ids, pairs, continuing_subword_prefix="", end_of_word_suffix="", fuse_unk=False)
    except Exception as error:  # the library raises bare Exception
        raise DataFormatError(f"{vocabulary} and {merges} do not fit each other: {error}") from error
    backend = Backend(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    _add_special(backend, [_END_OF_TEXT])
    return _define(
        backend, path, {"eos_token": _END_OF_TEXT, "bos_token": _END_OF_TEXT, "unk_token": _END_OF_TEXT}, "GPT-2"
    )


def open_bert_file(vocabulary: Path, *, path: Path, lower_case: bool, extra_tokens: Sequence[str] = ()) -> Definition:
    """Build BERT's WordPiece; [SEP] ends a document and [CLS] begins a text, as in Megatron-LM.

    Raises:
        DataFormatError: The file is missing, or lacks one of BERT's tokens.
    """
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, normalizers, pre_tokenizers

    words = _read_words(vocabulary)
    ids = {word: index for index, word in enumerate(words)}
    if missing := [token for token in _BERT_TOKENS if token not in ids]:
        raise DataFormatError(f"{vocabulary} lacks {', '.join(missing)}", hint="BERT's vocab.txt has one word a line")
    backend = Backend(models.WordPiece(ids, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=lower_case)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    _add_special(backend, [*_BERT_TOKENS, *extra_tokens])
    roles = {f"{token[1:-1].lower()}_token": token for token in _BERT_TOKENS}
    return _define(backend, path, {**roles, "eos_token": "[SEP]", "bos_token": "[CLS]"}, "BERT")


def _define(backend: "Backend", path: Path, roles: Mapping[str, str], model: str) -> Definition:
    content: dict[str, Any] = json.loads(backend.to_str())
    ids = {role: find_token(content, roles[role]) for role in ("eos_token", "bos_token", "pad_token") if role in roles}
    return Definition(
        path=path,
        content=content,
        eod_id=ids["eos_token"],
        bos_id=ids["bos_token"],
        pad_id=ids.get("pad_token"),
        settings={**_AS_IT_STANDS, **roles},
        named_tokens=roles,
        origin=f"{model}'s rules for vocabulary files",
    )


def _add_special(backend: "Backend", tokens: Iterable[str]) -> None:
    from tokenizers import AddedToken

    backend.add_special_tokens([AddedToken(token, special=True) for token in tokens])


def _read_vocabulary(file: Path) -> dict[str, int]:
    vocabulary = read_object(file)
    if not vocabulary or not all(isinstance(index, int) and index >= 0 for index in vocabulary.values()):
        raise DataFormatError(f"{file} is not a vocabulary: expected an object of tokens with their ids")
    return vocabulary


def _read_merges(file: Path) -> list[tuple[str, str]]:
    pairs = []
    for number, line in enumerate(_read_lines(file), start=1):
        if not line or (number == 1 and line.startswith("#version")):
            continue
        parts = line.split(" ")
        if len(parts) != 2:
            raise DataFormatError(f"{file}:{number} is not a merge of two tokens: {line[:60]!r}")
        pairs.append((parts[0], parts[1]))
    return pairs


def _read_words(file: Path) -> list[str]:
    return [line.rstrip() for line in _read_lines(file)]


def _read_lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except OSError as error:
        raise DataFormatError(f"{file} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataFormatError(f"{file} is not UTF-8 text: {error}") from error
