"""`megatron-7b preprocess`, which is also `tools/preprocess_data.py`: raw text to `.bin/.idx`."""

import argparse
import dataclasses
import math
import os
import sys
import time
from typing import TYPE_CHECKING

from megatron_7b.cli.bad_records import print_bad_records
from megatron_7b.cli.megatron_flags import explain_unknown
from megatron_7b.cli.progress import continued_by_the_same_command, open_progress
from megatron_7b.cli.tokenizer_options import add_tokenizer_options, open_tokenizer

if TYPE_CHECKING:
    from megatron_7b.data.preprocess.job import PreprocessReport
    from megatron_7b.data.preprocess.preprocessing import PreprocessOptions
    from megatron_7b.data.preprocess.shards import Shard

SUMMARY = "Tokenize JSONL, parquet or plain text into Megatron's .bin/.idx files."

_MAX_WORKERS = 1024

_EPILOG = """\
output:
  PREFIX_KEY_document.bin and .idx (PREFIX_KEY_sentence with --split-sentences) in Megatron's MMIDIDX format, and
  PREFIX_KEY_document.json, a manifest: tokenizer, counts, hashes, sources. They appear only when all is done.

killed or interrupted:
  The same command continues where the last one stopped, and writes byte for byte what an uninterrupted run writes.
  Until then, PREFIX_KEY_document.journal and .tmp files remain there.

shards:
  --shard i/N reads the i-th of N parts and writes PREFIX_0000i-of-0000N_KEY_document; `megatron-7b data merge` joins
  them to what one run writes. In a Slurm job array, or a step of several tasks, each process takes its part by itself.

bad records:
  Lines that are not JSON, lack a key, hold no string, or are not UTF-8 are skipped and counted; the first are named.
  --strict stops at the first one instead, and publishes nothing.

engines:
  fastokens encodes some 20 times faster than the reference (tokenizers). It is compared with the reference on probes,
  on a sample spread over the corpus, and wherever a character turns up that has not been compared yet; the reference
  takes over where they differ.

example:
  megatron-7b preprocess --input 'shards/*.jsonl.zst' --output-prefix data/web --tokenizer-model tok --append-eod
"""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser; names are Megatron's if it has the option."""
    parser = argparse.ArgumentParser(
        prog="megatron-7b preprocess",
        description=SUMMARY,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    data = parser.add_argument_group("input")
    data.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="F",
        help="files, globs or folders: .jsonl, .json (one object per line), .txt, each also .gz or .zst; .parquet",
    )
    data.add_argument(
        "--json-keys", nargs="+", default=["text"], metavar="KEY", help="one corpus per key (default: text)"
    )
    data.add_argument(
        "--text-documents",
        choices=["file", "paragraph", "line"],
        default="file",
        help="what one document of a .txt file is: the whole file (held in memory), what is between blank lines, or "
        "each line (default: file)",
    )
    data.add_argument("--split-sentences", action="store_true", help="one sequence per sentence (nltk's Punkt)")
    data.add_argument(
        "--lang",
        default="english",
        help="whose sentences: english, zh, …, an installed Punkt model, or learned (default: english)",
    )
    data.add_argument(
        "--shard",
        default=None,
        metavar="i/N",
        help="read only the i-th of N parts, from 0; none: all of it (default: what Slurm says, if it started several)",
    )
    data.add_argument("--strict", action="store_true", help="stop at the first bad record")

    tokens = parser.add_argument_group("tokenizer")
    add_tokenizer_options(tokens)
    tokens.add_argument("--append-eod", action="store_true", help="end each document with the end-of-document token")
    tokens.add_argument("--prepend-bos", action="store_true", help="begin each document with the bos token")
    tokens.add_argument("--engine", choices=["auto", "tokenizers", "fastokens", "gigatoken"], default="auto")
    tokens.add_argument(
        "--verify",
        choices=["sample", "all"],
        default="sample",
        help="compare the fast engine on a sample or on every document (default: sample)",
    )
    tokens.add_argument(
        "--verify-sample-mb",
        type=_megabytes,
        default=None,
        metavar="MB",
        help="size of the sample (default: a thousandth of the input, at least 0.25)",
    )

    output = parser.add_argument_group("output and speed")
    output.add_argument("--output-prefix", required=True, metavar="PREFIX")
    output.add_argument("--overwrite", action="store_true", help="replace existing output")
    output.add_argument("--workers", type=_workers, default=None, metavar="N", help="threads (default: all cores)")
    output.add_argument(
        "--log-interval",
        type=_positive,
        default=None,
        metavar="DOCUMENTS",
        help="documents between progress lines without a terminal (default: a line every 10 seconds)",
    )
    _add_megatrons(parser)
    return parser


def _add_megatrons(parser: argparse.ArgumentParser) -> None:
    same = parser.add_argument_group("Megatron's options that ask for what happens anyway")
    same.add_argument("--partitions", type=_positive, metavar="N", help="no effect: one process uses all cores")
    same.add_argument("--keep-sequential-samples", action="store_true", help="documents stay in input order")
    same.add_argument(
        "--tokenizer-hf-no-include-special-tokens",
        action="store_true",
        help="a tokenizer.json's post-processor adds nothing; --prepend-bos and --append-eod do",
    )


def main(argv: list[str]) -> int:
    """Run the command; 0 on success.

    Raises:
        MegatronError: A mistake that the user can fix; nothing was published.
    """
    started = time.perf_counter()
    arguments = _parse(argv)
    tokenizer = open_tokenizer(arguments)
    if tokenizer.kind == "hugging_face" and tokenizer.origin != "tokenizer.json":
        _say(f"tokenizer: {tokenizer.origin}")
    from megatron_7b.data.preprocess.preprocessing import preprocess_files

    with continued_by_the_same_command():
        report = preprocess_files(
            arguments.input,
            arguments.output_prefix,
            tokenizer,
            _options(arguments),
            command=["megatron-7b", "preprocess", *argv],
            open_progress=lambda total: open_progress(total, arguments.log_interval),
            say=_say,
        )
    _print_report(report, time.perf_counter() - started)
    return 0


def _options(arguments: argparse.Namespace) -> "PreprocessOptions":
    from megatron_7b.data.preprocess.preprocessing import PreprocessOptions

    names = [field.name for field in dataclasses.fields(PreprocessOptions)]
    values = {name: getattr(arguments, name) for name in names}
    return PreprocessOptions(
        **{**values, "json_keys": tuple(arguments.json_keys), "shard": _choose_shard(arguments.shard)}
    )


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = build_parser()
    arguments, unknown = parser.parse_known_args(argv)
    explain_unknown(unknown)
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    return arguments


def _choose_shard(given: str | None) -> "Shard | None":
    from megatron_7b.data.preprocess.shards import Shard, find_slurm_shard

    if given is not None:
        return None if given == "none" else Shard.parse(given)
    found = find_slurm_shard(os.environ)
    if found is None:
        return None
    shard, origin = found
    _say(f"shard {shard}, from {origin} (--shard none takes all of the input)")
    return shard


def _print_report(report: "PreprocessReport", seconds: float) -> None:
    if report.outcome == "published":
        print(f"a former run had written all of {', '.join(report.prefixes)}: gave the files their names")
    elif report.outcome == "found":
        print(f"nothing to do: this command has already written {', '.join(report.prefixes)}")
    else:
        _print_summary(report, seconds)


def _print_summary(report: "PreprocessReport", seconds: float) -> None:
    for prefix in report.prefixes:
        print(f"wrote {prefix}.bin, .idx, .json")
    megabytes = report.input_bytes / 1e6
    size = f"{report.documents:,} documents, {report.tokens:,} tokens from {megabytes:,.1f} MB"
    if report.continued_at:
        print(f"{size}, {report.continued_at:,} of the documents by a former run; with {report.engine}")
    else:
        rate = f"{megabytes / seconds:,.1f} MB/s, {report.tokens / seconds / 1e6:,.2f} M tokens/s"
        print(f"{size} in {seconds:.2f} s: {rate} with {report.engine}")
    if report.empty_documents:
        print(f"{report.empty_documents:,} empty documents")
    if report.num_differences:
        print(f"{report.num_differences:,} documents on which the fast engine was wrong have the reference's ids")
    print_bad_records(report.first_bad, report.num_bad)


def _say(message: str) -> None:
    print(message, file=sys.stderr)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


def _workers(text: str) -> int:
    if (value := _positive(text)) > _MAX_WORKERS:
        raise argparse.ArgumentTypeError(f"{value} are more than {_MAX_WORKERS} threads; one per core is best")
    return value


def _megabytes(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of megabytes, 0 or more")
    return value
