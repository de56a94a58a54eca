"""`megatron-7b tokenizer train|info|fertility`: make a byte-level BPE, look at any tokenizer, compare some."""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_7b.cli.commands.tokenizer_fertility import add_fertility
from megatron_7b.cli.commands.tokenizer_info import add_info
from megatron_7b.errors import ConfigError
from megatron_7b.runtime.output_paths import check_folder_to_write

if TYPE_CHECKING:
    from megatron_7b.cli.progress import Progress
    from megatron_7b.data.reading.records import BadRecord
    from megatron_7b.data.reading.sources import Source

SUMMARY = "Train a byte-level BPE tokenizer, show what a tokenizer is, count what it spends on words."

_BLOCK_BYTES = 1 << 20
_NUM_BAD_NAMED = 10


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="megatron-7b tokenizer", description=SUMMARY)
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    train = actions.add_parser(
        "train",
        help="train a byte-level BPE and write a Hugging Face folder",
        description="Train a byte-level BPE and write a Hugging Face folder (tokenizer.json, tokenizer_config.json).",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    train.set_defaults(run=_train)
    train.add_argument(
        "--input", nargs="+", required=True, metavar="F", help="files, globs or folders, as `preprocess` reads"
    )
    train.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder to write")
    train.add_argument(
        "--vocab-size", type=int, required=True, metavar="N", help="bytes, merges and special tokens together"
    )
    train.add_argument(
        "--special-tokens",
        nargs="+",
        default=["<|endoftext|>", "<|pad|>"],
        metavar="TOKEN",
        help="get the first ids; the first one ends documents; bos and pad are found by their usual names",
    )
    train.add_argument("--split-digits", action="store_true", help="every digit is a token of its own")
    train.add_argument(
        "--byte-fallback",
        action="store_true",
        help="begin with characters, as SentencePiece does, and spell the rare ones in bytes (default: all in bytes)",
    )
    train.add_argument("--json-key", default="text", metavar="KEY", help="which key of a record holds the text")
    train.add_argument(
        "--sample-mb", type=float, metavar="MB", help="train on so much of the input, evenly spread; all if absent"
    )
    train.add_argument("--model-max-length", type=int, default=2048, metavar="TOKENS", help="written into the settings")
    train.add_argument("--overwrite", action="store_true", help="replace an existing tokenizer")

    add_info(actions)
    add_fertility(actions)
    return parser


def main(argv: list[str]) -> int:
    """Run the command; 0 on success.

    Raises:
        MegatronError: A mistake that the user can fix.
    """
    arguments = build_parser().parse_args(argv)
    action: Callable[[argparse.Namespace], int] = arguments.run
    return action(arguments)


def _train(arguments: argparse.Namespace) -> int:
    from megatron_7b.cli.progress import open_progress
    from megatron_7b.data.reading.sources import find_sources
    from megatron_7b.tokenizer.train import BpeOptions, check_bpe_options, save_hugging_face_folder, train_bpe

    started = time.perf_counter()
    options = BpeOptions(
        vocab_size=arguments.vocab_size,
        special_tokens=tuple(arguments.special_tokens),
        split_digits=arguments.split_digits,
        byte_fallback=arguments.byte_fallback,
        model_max_length=arguments.model_max_length,
        show_progress=sys.stderr.isatty(),
    )
    check_bpe_options(options)
    check_folder_to_write(arguments.output, "the output folder")
    if (arguments.output / "tokenizer.json").exists() and not arguments.overwrite:
        raise ConfigError(f"{arguments.output} already holds a tokenizer", hint="--overwrite replaces it")
    sources = find_sources(arguments.input)
    bad: list[BadRecord] = []
    with open_progress(sum(source.size for source in sources)) as progress:
        texts = _read_texts(sources, arguments.json_key, arguments.sample_mb, bad, progress)
        tokenizer = train_bpe(texts, options)
    save_hugging_face_folder(tokenizer, options, arguments.output)
    size = tokenizer.get_vocab_size()
    print(f"wrote {arguments.output}: {size:,} tokens, trained in {time.perf_counter() - started:.1f} s")
    if size < options.vocab_size:
        print(
            f"warning: {size:,} tokens instead of the {options.vocab_size:,} that --vocab-size asks for: no more pairs "
            f"occur {options.min_frequency} times in the {_say_amount(arguments, sources)}\n"
            "hint: train on more text, or ask for fewer tokens",
            file=sys.stderr,
        )
    if bad:
        print(f"{len(bad):,} bad records left out, the first:")
        for record in bad[:_NUM_BAD_NAMED]:
            print(f"  {record}")
    return 0


def _read_texts(
    sources: "Sequence[Source]", key: str, sample_mb: float | None, bad: "list[BadRecord]", progress: "Progress"
) -> Iterator[list[str]]:
    """Texts of every block, or of evenly spread ones until the sample is full."""
    from megatron_7b.data.reading.records import parse_block

    total = max(1, sum(source.size for source in sources))
    share = 1.0 if sample_mb is None else min(1.0, sample_mb * 1e6 / total)
    # Small inputs in small blocks, so that a sample is spread there too.
    block_bytes = min(_BLOCK_BYTES, max(1 << 14, total // 64))
    owed = 1.0 - share
    documents = characters = 0
    for source in sources:
        for block in source.read_blocks([key], "file", block_bytes):
            owed += share
            if owed < 1.0:
                continue
            owed -= 1.0
            parsed = parse_block(block, [key])
            bad += parsed.bad
            documents += len(parsed.numbers)
            characters += sum(map(len, parsed.texts[0]))
            progress.update(sum(source.bytes_read for source in sources), documents, characters // 4)
            yield parsed.texts[0]


def _say_amount(arguments: argparse.Namespace, sources: "Sequence[Source]") -> str:
    size = sum(source.size for source in sources)
    sampled = "" if arguments.sample_mb is None else f"; --sample-mb {arguments.sample_mb:g} takes a part of it"
    return f"{size:,} bytes of input{sampled}"
