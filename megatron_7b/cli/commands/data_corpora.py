"""`megatron-7b data verify`, `adopt` and `merge`: whole corpora and their manifests."""

import argparse
import json
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from megatron_7b.cli.progress import open_byte_progress

if TYPE_CHECKING:
    from megatron_7b.data.upkeep.verify import CorpusReport

type Actions = "argparse._SubParsersAction[argparse.ArgumentParser]"


def add_verify(actions: "Actions") -> None:
    """Declare `data verify`."""
    verify = actions.add_parser(
        "verify",
        help="compare corpora with their manifests: hashes, structure, counts, ids",
        description="Read PREFIX.bin and .idx completely and compare them with the manifest PREFIX.json: hashes, "
        "sizes, structure, counts, and that every id is in the vocabulary. The exit code is 0 only if all is well.",
    )
    verify.set_defaults(run=_verify)
    verify.add_argument("prefixes", nargs="+", metavar="PREFIX", help="path without extension or _text_document")
    verify.add_argument("--json", action="store_true", help="a JSON array, one object per corpus")


def add_adopt(actions: "Actions") -> None:
    """Declare `data adopt`."""
    adopt = actions.add_parser(
        "adopt",
        help="write the manifest of a corpus that has none",
        description="Check a corpus, such as one that Megatron's tool wrote, completely, and write PREFIX.json.",
    )
    adopt.set_defaults(run=_adopt)
    adopt.add_argument("prefix", metavar="PREFIX", help="path without extension or _text_document")
    adopt.add_argument(
        "--tokenizer", required=True, metavar="DIR", help="the one that wrote it; ids beyond it: refused"
    )
    adopt.add_argument("--overwrite", action="store_true", help="replace an existing manifest")


def add_merge(actions: "Actions") -> None:
    """Declare `data merge`."""
    merge = actions.add_parser(
        "merge",
        help="join corpora, such as shards, in the order given",
        description="Join corpora in the order given into what one preprocessing run over the same documents writes. "
        "Each needs its manifest (`data adopt`); it is checked against the hashes there while it is copied.",
    )
    merge.set_defaults(run=_merge)
    merge.add_argument("prefixes", nargs="+", metavar="PREFIX", help="path without extension or _text_document")
    merge.add_argument("--output", required=True, metavar="PREFIX", help="of the new corpus, taken as it is")


def _verify(arguments: argparse.Namespace) -> int:
    from megatron_7b.data.upkeep.verify import CorpusCheck, verify_corpora

    started = time.perf_counter()
    checks = [CorpusCheck(prefix) for prefix in arguments.prefixes]
    with open_byte_progress(sum(check.num_bytes for check in checks)) as advance:
        reports = verify_corpora(checks, advance=advance)
    seconds = time.perf_counter() - started
    if arguments.json:
        print(json.dumps([{"ok": not one.problems, **asdict(one)} for one in reports], ensure_ascii=False))
    else:
        for report in reports:
            _print_report(report)
        if total := sum(report.bytes_hashed for report in reports):
            print(f"{total / 1e6:,.1f} MB in {seconds:.2f} s, {total / 1e6 / seconds:,.0f} MB/s")
    if any(report.problems and check.exists for check, report in zip(checks, reports, strict=True)):
        return 1
    return 0 if all(check.exists for check in checks) else 2


def _print_report(report: "CorpusReport") -> None:
    for warning in report.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    for problem in report.problems:
        print(f"error: {problem}", file=sys.stderr)
    size = "" if report.tokens is None else f"{report.documents:,} documents, {report.tokens:,} tokens: "
    count = len(report.problems)
    verdict = f"{count} problem{'s' if count > 1 else ''}" if count else "structure good" if report.warnings else "good"
    print(f"{report.prefix}: {size}{verdict}")


def _adopt(arguments: argparse.Namespace) -> int:
    from megatron_7b.data.corpus.indexed_dataset import resolve_prefix
    from megatron_7b.data.corpus.manifest_reader import manifest_path
    from megatron_7b.data.upkeep.adopt import adopt_corpus
    from megatron_7b.tokenizer import load_tokenizer

    prefix = resolve_prefix(arguments.prefix)
    command = ["megatron-7b", "data", "adopt", arguments.prefix, "--tokenizer", arguments.tokenizer]
    with open_byte_progress(_sizes(prefix)) as advance:
        manifest = adopt_corpus(
            prefix,
            load_tokenizer(arguments.tokenizer),
            advance=advance,
            overwrite=arguments.overwrite,
            command=command,
        )
    counts = manifest.counts
    ids = "no ids" if counts.max_id is None else f"ids {counts.min_id} to {counts.max_id}"
    print(f"wrote {manifest_path(prefix)}: {counts.documents:,} documents, {counts.tokens:,} tokens, {ids}")
    return 0


def _merge(arguments: argparse.Namespace) -> int:
    from megatron_7b.data.upkeep.merge import Merge

    started = time.perf_counter()
    merge = Merge(arguments.prefixes, arguments.output)
    if merge.is_done:
        print(f"nothing to do: {arguments.output} already holds these corpora")
        return 0
    for difference in merge.find_differences():
        print(f"warning: {difference}", file=sys.stderr)
    command = ["megatron-7b", "data", "merge", *arguments.prefixes, "--output", arguments.output]
    with _terminated_by_exception(), open_byte_progress(merge.num_bytes) as advance:
        manifest = merge.run(advance=advance, command=command)
    seconds, counts = time.perf_counter() - started, manifest.counts
    print(f"wrote {arguments.output}.bin, .idx, .json from {len(arguments.prefixes)} corpora")
    rate = f"{merge.num_bytes / 1e6:,.1f} MB in {seconds:.2f} s, {merge.num_bytes / 1e6 / seconds:,.0f} MB/s"
    print(f"{counts.documents:,} documents, {counts.tokens:,} tokens, {rate}")
    return 0


def _sizes(prefix: str) -> int:
    files = (Path(prefix + suffix) for suffix in (".bin", ".idx"))
    return sum(file.stat().st_size for file in files if file.is_file())


@contextmanager
def _terminated_by_exception() -> Iterator[None]:
    """Let SIGTERM (a batch system's time limit) end the process as an exception does, so that it is cleaned up."""

    def leave(number: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    former = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)
