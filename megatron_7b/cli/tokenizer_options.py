"""The options of `preprocess` that say which tokenizer to take, Megatron-LM's names for them included."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_7b.cli.megatron_flags import TOKENIZER_TYPES
from megatron_7b.errors import ConfigError, PathError

if TYPE_CHECKING:
    from megatron_7b.tokenizer import Tokenizer, TokenizerKind
    from megatron_7b.tokenizer.definition import Definition
    from megatron_7b.tokenizer.vocabulary_files import VocabularyType

_KINDS: dict[str, "TokenizerKind | None"] = {
    "auto": None,
    "hugging_face": "hugging_face",
    "HuggingFaceTokenizer": "hugging_face",
    "sentencepiece": "sentencepiece",
    "SentencePieceTokenizer": "sentencepiece",
    "GPTSentencePieceTokenizer": "sentencepiece",
    "Llama2Tokenizer": "sentencepiece",
    "tiktoken": "tiktoken",
    "TikTokenizer": "tiktoken",
    "Llama3Tokenizer": "tiktoken",
    "bytes": "bytes",
}
_VOCABULARY_TYPES: dict[str, "VocabularyType"] = {
    "GPT2BPETokenizer": "GPT2BPETokenizer",
    "BertWordPieceLowerCase": "BertWordPieceLowerCase",
    "BertWordPieceCase": "BertWordPieceCase",
}

_WAYS = """\
--tokenizer-model PATH                              a Hugging Face folder, tokenizer.json, SentencePiece .model,
                                                    .tiktoken file, or a folder of vocab.json and merges.txt
--vocab-file vocab.json --merge-file merges.txt     GPT-2's files (--tokenizer-type GPT2BPETokenizer)
--vocab-file vocab.txt                              BERT's file (--tokenizer-type BertWordPieceLowerCase or …Case)
--tokenizer-model bytes                             one token per byte, no files
megatron-7b tokenizer train                         makes a new one"""


def add_tokenizer_options(parser: argparse._ArgumentGroup) -> None:
    """Add the options."""
    parser.add_argument(
        "--tokenizer-model",
        metavar="PATH",
        help="Hugging Face folder, tokenizer.json, SentencePiece .model, .tiktoken file, folder of vocab.json and "
        "merges.txt or of vocab.txt, or the word bytes",
    )
    parser.add_argument(
        "--tokenizer-type",
        type=_tokenizer_type,
        default="auto",
        metavar="TYPE",
        help=f"kind of tokenizer: {', '.join((*_KINDS, *_VOCABULARY_TYPES))} (default: detected from the files)",
    )
    parser.add_argument("--vocab-file", type=Path, metavar="FILE", help="GPT-2's vocab.json or BERT's vocab.txt")
    parser.add_argument("--merge-file", type=Path, metavar="FILE", help="GPT-2's merges.txt")


def open_tokenizer(arguments: argparse.Namespace) -> "Tokenizer":
    """Load the tokenizer that the options name.

    Raises:
        ConfigError: They name no tokenizer, or two.
        DataFormatError: What they name cannot be read.
    """
    _check(arguments)
    if arguments.vocab_file is not None or arguments.tokenizer_type in _VOCABULARY_TYPES:
        from megatron_7b.data.preprocess.kept_tokenizer import kept_tokenizer
        from megatron_7b.tokenizer.hugging_face import HuggingFaceTokenizer

        return HuggingFaceTokenizer(_open_vocabulary_files(arguments, kept_tokenizer(arguments.output_prefix)))
    from megatron_7b.tokenizer import load_tokenizer

    return load_tokenizer(arguments.tokenizer_model or "bytes", kind=_KINDS[arguments.tokenizer_type])


def _check(arguments: argparse.Namespace) -> None:
    model, vocabulary, merges = arguments.tokenizer_model, arguments.vocab_file, arguments.merge_file
    kind = arguments.tokenizer_type
    if model is None and vocabulary is None and merges is None and kind != "bytes":
        raise ConfigError(f"no tokenizer is named; the ways to name one:\n{_WAYS}")
    if model is not None and (vocabulary is not None or merges is not None):
        raise ConfigError(
            f"--tokenizer-model {model} and --vocab-file or --merge-file name two tokenizers", hint="leave one out"
        )
    for file in filter(None, (vocabulary, merges)):
        if not file.is_file():
            raise PathError(f"{file} is not a file", hint="--vocab-file and --merge-file name GPT-2's or BERT's files")
    if merges is not None and vocabulary is None:
        raise ConfigError(f"--merge-file {merges} needs the --vocab-file that belongs to it")
    if vocabulary is not None and kind not in ("auto", *_VOCABULARY_TYPES):
        raise ConfigError(
            f"--vocab-file {vocabulary} is for --tokenizer-type {', '.join(_VOCABULARY_TYPES)}, not {kind}",
            hint="--tokenizer-model names the file or folder of the others",
        )
    if (
        vocabulary is not None
        and merges is None
        and kind in ("auto", "GPT2BPETokenizer")
        and vocabulary.suffix == ".json"
    ):
        raise ConfigError(f"--vocab-file {vocabulary} needs the --merge-file that belongs to it")
    if merges is not None and kind in ("BertWordPieceLowerCase", "BertWordPieceCase"):
        raise ConfigError(f"--merge-file {merges}: {kind} has no merges", hint="leave it out")


def _open_vocabulary_files(arguments: argparse.Namespace, path: Path) -> "Definition":
    from megatron_7b.tokenizer.vocabulary_files import open_typed_files, open_untyped_files

    kind = _VOCABULARY_TYPES.get(arguments.tokenizer_type)
    vocabulary, merges = arguments.vocab_file, arguments.merge_file
    if kind is None:
        return open_untyped_files(vocabulary, merges, path=path)
    if vocabulary is None:
        folder = Path(arguments.tokenizer_model)
        names = ("vocab.json", "merges.txt") if kind == "GPT2BPETokenizer" else ("vocab.txt",)
        if not all((folder / name).is_file() for name in names):
            raise ConfigError(f"--tokenizer-type {kind} needs {' and '.join(names)}, which {folder} does not hold")
        vocabulary, merges = folder / names[0], folder / names[1] if len(names) > 1 else None
    return open_typed_files(kind, vocabulary, merges, path=path)


def _tokenizer_type(text: str) -> str:
    if text in _KINDS or text in _VOCABULARY_TYPES:
        return text
    instead = TOKENIZER_TYPES.get(text, f"expected one of {', '.join((*_KINDS, *_VOCABULARY_TYPES))}")
    raise argparse.ArgumentTypeError(f"{text!r} is not taken here: {instead}")
