"""`megatron-7b preprocess`, which is also `tools/preprocess_data.py`: raw text to `.bin/.idx`."""

import argparse
import math
import os
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_7b.cli.megatron_flags import explain_unknown
from megatron_7b.cli.progress import continued_by_the_same_command
from megatron_7b.cli.tokenizer_options import (
    add_tokenizer_options,
    check_kept_tokenizer,
    keep_tokenizer,
    open_tokenizer,
)
from megatron_7b.errors import DataFormatError

if TYPE_CHECKING:
    from concurrent.futures import Future

    from megatron_7b.data.preprocess.encoding import BatchEncoder
    from megatron_7b.data.preprocess.job import PreprocessJob, PreprocessReport
    from megatron_7b.data.preprocess.journal import Journal
    from megatron_7b.data.preprocess.shards import Shard
    from megatron_7b.data.reading.sources import Source
    from megatron_7b.tokenizer import Tokenizer
    from megatron_7b.tokenizer.engines import Engine

    type Building = Future[tuple[Engine | None, str]]

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
    """The command line; names are Megatron's where it has the option."""
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
        help="what one document of a .txt file is: the whole file (held in memory), what lies between blank lines, or "
        "each line (default: file)",
    )
    data.add_argument("--split-sentences", action="store_true", help="one sequence per sentence (nltk's Punkt)")
    data.add_argument("--lang", default="english", help="language of the installed Punkt model (default: english)")
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
        help="documents between progress lines where there is no terminal (default: a line every 10 seconds)",
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
    arguments.workers = arguments.workers or len(os.sched_getaffinity(0))

    tokenizer = open_tokenizer(arguments)
    if tokenizer.kind == "hugging_face" and tokenizer.origin != "tokenizer.json":
        print(f"tokenizer: {tokenizer.origin}", file=sys.stderr)
    building = _start_building(tokenizer, arguments)  # takes as long as what is imported meanwhile

    from megatron_7b.data.preprocess.job import check_job, discard_remains, is_done, open_journal
    from megatron_7b.data.preprocess.pipeline import publish_all
    from megatron_7b.data.reading.sources import find_sources

    shard = _choose_shard(arguments.shard)
    sources: Sequence[Source] = find_sources(arguments.input)
    if arguments.verify_sample_mb is None:
        arguments.verify_sample_mb = max(0.25, sum(source.size for source in sources) / 1e9)
    job = _build_job(arguments, tokenizer, shard, sources, argv)
    job = _add_splitter(job, sources, arguments)  # all of the input, so that every shard splits alike
    sources = _take_part(sources, job)
    check_job(job, sources)
    check_kept_tokenizer(tokenizer, arguments.output_prefix, overwrite=job.overwrite)
    with continued_by_the_same_command(), open_journal(job, sources) as journal:
        if journal.is_complete:
            publish_all(job, journal)
            print(f"a former run had written all of {', '.join(job.get_output_prefixes())}: gave the files their names")
            return 0
        if not job.overwrite and is_done(job, sources):
            discard_remains(job, journal)
            print(f"nothing to do: this command has already written {', '.join(job.get_output_prefixes())}")
            return 0
        keep_tokenizer(tokenizer, arguments.output_prefix)
        report, encoder_name = _run(arguments, job, tokenizer, building, sources, journal)
    _print_summary(report, encoder_name, sum(source.share for source in sources), time.perf_counter() - started)
    return 0


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = build_parser()
    arguments, unknown = parser.parse_known_args(argv)
    explain_unknown(unknown)
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    return arguments


def _start_building(tokenizer: "Tokenizer", arguments: argparse.Namespace) -> "Building":
    """Build the fast engine on a thread of its own."""
    from concurrent.futures import ThreadPoolExecutor

    from megatron_7b.tokenizer.engines import build_fast_engine

    pool = ThreadPoolExecutor(1, "build")
    building = pool.submit(build_fast_engine, tokenizer, arguments.engine, arguments.workers)
    pool.shutdown(wait=False)
    return building


def _choose_shard(given: str | None) -> "Shard | None":
    from megatron_7b.data.preprocess.shards import Shard, find_slurm_shard

    if given is not None:
        return None if given == "none" else Shard.parse(given)
    found = find_slurm_shard(os.environ)
    if found is None:
        return None
    shard, origin = found
    print(f"shard {shard}, from {origin} (--shard none takes all of the input)", file=sys.stderr)
    return shard


def _take_part(sources: "Sequence[Source]", job: "PreprocessJob") -> "Sequence[Source]":
    from megatron_7b.data.preprocess.shards import take_shard

    return sources if job.shard is None else take_shard(sources, job.shard, job.text_documents)


def _build_job(
    arguments: argparse.Namespace,
    tokenizer: "Tokenizer",
    shard: "Shard | None",
    sources: "Sequence[Source]",
    argv: Sequence[str],
) -> "PreprocessJob":
    from megatron_7b.data.corpus.manifest import describe_tokenizer
    from megatron_7b.data.preprocess.job import PreprocessJob
    from megatron_7b.data.preprocess.shards import hash_inputs

    return PreprocessJob(
        output_prefix=arguments.output_prefix,
        tokenizer=describe_tokenizer(tokenizer),
        keys=tuple(arguments.json_keys),
        append_eod=arguments.append_eod,
        prepend_bos=arguments.prepend_bos,
        text_documents=arguments.text_documents,
        shard=shard,
        inputs_hash=None if shard is None else hash_inputs(sources),
        num_workers=arguments.workers,
        strict=arguments.strict,
        overwrite=arguments.overwrite,
        engine=arguments.engine,
        verify=arguments.verify,
        sample_characters=int(arguments.verify_sample_mb * 1e6),
        command=["megatron-7b", "preprocess", *argv],
        level="sentence" if arguments.split_sentences else "document",
    )


def _add_splitter(job: "PreprocessJob", sources: "Sequence[Source]", arguments: argparse.Namespace) -> "PreprocessJob":
    if not arguments.split_sentences:
        return job
    from dataclasses import replace

    from megatron_7b.data.preprocess.sentences import build_sentence_splitter

    splitter, origin = build_sentence_splitter(sources, job.keys[0], arguments.lang, job.text_documents)
    print(f"sentences: {origin}", file=sys.stderr)
    return replace(job, split_sentences=splitter, sentence_model=origin)


def _run(
    arguments: argparse.Namespace,
    job: "PreprocessJob",
    tokenizer: "Tokenizer",
    building: "Building",
    sources: "Sequence[Source]",
    journal: "Journal",
) -> "tuple[PreprocessReport, str]":
    """Run with the fast engine, and once more with the reference if that is rejected."""
    from megatron_7b.cli.progress import open_progress
    from megatron_7b.data.preprocess.pipeline import run_preprocess
    from megatron_7b.data.reading.sources import find_sources
    from megatron_7b.tokenizer.checked import EngineRejectedError, TrustedEngine
    from megatron_7b.tokenizer.engines import build_reference_engine

    total = sum(source.share for source in sources)
    try:
        if not journal.needs_reference:
            encoder = _build_encoder(arguments, tokenizer, building)
            with open_progress(total, arguments.log_interval) as progress:
                return run_preprocess(job, sources, encoder, progress, journal), encoder.name
    except EngineRejectedError as error:
        if arguments.engine not in ("auto", "tokenizers"):
            raise DataFormatError(str(error), hint="--engine tokenizers is right by definition") from error
        print(f"{error}\nStarting again with the reference.", file=sys.stderr)
        journal.needs_reference = True  # also for whoever continues this run
    encoder = TrustedEngine(build_reference_engine(tokenizer))
    with open_progress(total, arguments.log_interval) as progress:
        again = _take_part(find_sources(arguments.input), job)
        return run_preprocess(job, again, encoder, progress, journal), encoder.name


def _build_encoder(arguments: argparse.Namespace, tokenizer: "Tokenizer", building: "Building") -> "BatchEncoder":
    from megatron_7b.data._index import find_unknown
    from megatron_7b.tokenizer.checked import CheckedEngine, TrustedEngine
    from megatron_7b.tokenizer.engines import build_reference_engine

    reference = build_reference_engine(tokenizer)
    reference.encode_flat(["built at first use"])
    fast, reason = building.result()
    if fast is None:
        if arguments.engine == "auto" and tokenizer.kind != "bytes":
            print(f"engine: {reference.name} ({reason})", file=sys.stderr)
        return TrustedEngine(reference)
    checked = CheckedEngine(fast, reference, verify=arguments.verify, find_unknown=find_unknown)
    checked.probe(tokenizer)
    return checked


def _print_summary(report: "PreprocessReport", engine: str, total_bytes: int, seconds: float) -> None:
    for prefix in report.prefixes:
        print(f"wrote {prefix}.bin, .idx, .json")
    size = f"{report.documents:,} documents, {report.tokens:,} tokens from {total_bytes / 1e6:,.1f} MB"
    if report.continued_at:
        print(f"{size}, {report.continued_at:,} of the documents by a former run; with {engine}")
    else:
        rate = f"{total_bytes / 1e6 / seconds:,.1f} MB/s, {report.tokens / seconds / 1e6:,.2f} M tokens/s"
        print(f"{size} in {seconds:.2f} s: {rate} with {engine}")
    if report.empty_documents:
        print(f"{report.empty_documents:,} empty documents")
    if report.num_differences:
        print(f"{report.num_differences:,} documents on which the fast engine was wrong have the reference's ids")
    if report.num_bad:
        print(f"{report.num_bad:,} bad records left out, the first:")
        for bad in report.first_bad:
            print(f"  {bad}")


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
