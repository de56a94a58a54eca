"""`megatron-7b tokenizer train|info|fertility`: make a byte-level BPE, look at any tokenizer, compare some."""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

from megatron_7b.cli.bad_records import print_bad_records
from megatron_7b.cli.commands.tokenizer_fertility import add_fertility
from megatron_7b.cli.commands.tokenizer_info import add_info

SUMMARY = "Train a byte-level BPE tokenizer, show what a tokenizer is, count what it spends on words."


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
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
        "--sample-mb", type=float, metavar="MB", help="train on this much of the input, evenly spread; all if absent"
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
    from megatron_7b.data import train_tokenizer
    from megatron_7b.tokenizer import BpeOptions

    started = time.perf_counter()
    options = BpeOptions(
        vocab_size=arguments.vocab_size,
        special_tokens=tuple(arguments.special_tokens),
        split_digits=arguments.split_digits,
        byte_fallback=arguments.byte_fallback,
        model_max_length=arguments.model_max_length,
        show_progress=sys.stderr.isatty(),
    )
    trained = train_tokenizer(
        arguments.input,
        arguments.output,
        options,
        key=arguments.json_key,
        sample_mb=arguments.sample_mb,
        overwrite=arguments.overwrite,
        open_progress=open_progress,
    )
    seconds = time.perf_counter() - started
    print(f"wrote {arguments.output}: {trained.vocab_size:,} tokens, trained in {seconds:.1f} s")
    if trained.vocab_size < options.vocab_size:
        sample = arguments.sample_mb
        sampled = "" if sample is None else f"; --sample-mb {sample:g} takes a part of it"
        print(
            f"warning: {trained.vocab_size:,} tokens instead of the {options.vocab_size:,} that --vocab-size asks for: "
            f"no more pairs occur {options.min_frequency} times in the {trained.input_bytes:,} bytes of input"
            f"{sampled}\nhint: train on more text, or ask for fewer tokens",
            file=sys.stderr,
        )
    print_bad_records(trained.bad)
    return 0
