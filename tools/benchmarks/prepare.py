#!/usr/bin/env python3
"""What data preparation finds, what it drops wrongly, and how fast it is.

    tools/benchmarks/prepare.py                                     # writes docs/benchmarks/prepare.md
    tools/benchmarks/prepare.py --scale 0.05 --documents 2000 --output - --json

First `megatron-7b data prepare` over speeches (JSONL, web pages, a WARC file) and plays (parquet) into which copies,
personal data, other languages, boiler-plate and text of an evaluation were planted. Then near duplicates alone, at the
size and edit rate asked for.
"""

import argparse
import datetime as dt
import json
import os
import platform
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))
RESULTS = REPOSITORY / "docs" / "benchmarks" / "prepare.md"

import planted_corpus  # noqa: E402

_MARK = re.compile(r"zq(?:[bdfghklmnprstvw][aeiou]){5}")


@dataclass(frozen=True)
class Finding:
    """What became of the documents of one kind."""

    kind: str
    planted: int
    found: int
    """Dropped, or masked, as they should be."""
    wrong: int = 0
    """Of the clean ones: dropped."""


@dataclass(frozen=True)
class PlantedResult:
    """A run of data preparation over the planted corpus."""

    findings: list[Finding]
    reasons: dict[str, int]
    stages: list[dict[str, Any]]
    megabytes: float
    wall_seconds: float
    cpu_seconds: float
    """Of all processes."""
    peak_mib: float


@dataclass(frozen=True)
class NearResult:
    """Near duplicates among many documents."""

    documents: int
    megabytes: float
    sign_seconds: float
    find_seconds: float
    cpu_seconds: float
    """Of both, over all threads."""
    peak_mib: float
    recall: dict[str, float]
    """By share of edited words."""
    precision: float
    halves_dropped: float
    """Share of the documents that have half of their text in common with another one."""


def main() -> int:
    """Run both, print and write the tables."""
    arguments = _parse_arguments()
    with tempfile.TemporaryDirectory(dir=arguments.work_dir) as name:
        planted = run_planted(arguments, Path(name))
        near = run_near(arguments, Path(name))
    if arguments.json:
        print(json.dumps({"planted": asdict(planted), "near": asdict(near)}))
        return 0
    table = format_results(planted, near, arguments)
    print(table)
    if arguments.output != Path("-"):
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        previous = arguments.output.read_text() if arguments.output.exists() else "# Data preparation, measured\n"
        arguments.output.write_text(f"{previous}\n{table}")
    return 0


# ------------------------------------------------------------------------------------------------------ planted corpus


def run_planted(arguments: argparse.Namespace, work: Path) -> PlantedResult:
    """Build the corpus, run the command over it, and look for every mark in what came out."""
    builder = planted_corpus.Builder(arguments.speeches, arguments.plays, work / "raw", arguments.scale)
    corpus = builder.build()
    out = work / "clean"
    command = [sys.executable, "-m", "megatron_7b", "data", "prepare", "--input", *map(str, corpus.inputs)]
    command += ["--output-dir", str(out), "--config", str(corpus.recipe), "--workers", str(arguments.workers)]
    started = time.perf_counter()
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=sys.stderr)
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    if arguments.keep:
        subprocess.run(["cp", "-r", str(work), str(arguments.keep)], check=True)
    cpu = usage.ru_utime + usage.ru_stime
    report = json.loads((out / "report.json").read_text())
    reasons: Counter[str] = Counter()
    for stage in report["stages"]:
        reasons.update(stage["removed"])
    raw = sum(int(file["bytes"]) for file in report["inputs"])
    findings = judge(corpus, read_output(out), sum(stage["quarantined"] for stage in report["stages"]))
    return PlantedResult(
        findings, dict(reasons.most_common()), report["stages"], raw / 1e6, wall, cpu, usage.ru_maxrss / 1024
    )


def read_output(folder: Path) -> list[str]:
    """All texts that came out."""
    from megatron_7b.data.reading.records import parse_block
    from megatron_7b.data.reading.sources import find_sources

    splits = [str(folder / split) for split in ("train", "validation", "test") if any((folder / split).glob("*"))]
    texts: list[str] = []
    for source in find_sources(splits):
        for block in source.read_blocks(["text"], "file", 1 << 20):
            parsed = parse_block(block, ["text"])
            if parsed.bad:
                raise RuntimeError(f"what was written cannot be read: {parsed.bad[0]}")
            texts += parsed.texts[0]
    return texts


def judge(corpus: planted_corpus.Corpus, texts: Sequence[str], quarantined: int) -> list[Finding]:
    """Compare what came out with what went in."""
    holders: dict[str, list[str]] = {}
    for text in texts:
        for mark in _MARK.findall(text):
            holders.setdefault(mark, []).append(text)
    out = Counter({mark: len(found) for mark, found in holders.items()})
    clean = set(corpus.clean.marks)
    findings = []
    for planted in corpus.planted:
        if planted.secrets:
            stayed = [mark for mark in planted.marks if out[mark]]
            masked = sum(planted.secrets[mark] not in holders[mark][0] for mark in stayed)
            findings.append(Finding(planted.kind, len(planted.marks), masked, len(planted.marks) - len(stayed)))
        elif clean.issuperset(planted.marks):  # copies: one of each stays at most
            findings.append(Finding(planted.kind, len(planted.marks), sum(out[mark] <= 1 for mark in planted.marks)))
        else:
            findings.append(Finding(planted.kind, len(planted.marks), sum(not out[mark] for mark in planted.marks)))
    pages = [text for mark in corpus.pages for text in holders.get(mark, [])]
    bare = sum(not any(words in text for words in planted_corpus.FURNITURE) for text in pages)
    skipped = sum(planted_corpus.SKIP_LINK not in text for text in pages)
    lost = sum(not out[mark] for mark in clean)
    return [
        *findings,
        Finding("menus, forms and footers around the text of web pages", len(pages), bare),
        Finding("links that skip the menu, on the same pages", len(pages), skipped),
        Finding("unreadable records, quarantined", corpus.unreadable, quarantined),
        Finding(corpus.clean.kind, len(clean), 0, lost),
    ]


# ------------------------------------------------------------------------------------------------------ near duplicates


def run_near(arguments: argparse.Namespace, work: Path) -> NearResult:
    """Plant edited copies among documents of shuffled phrases, and look for them, in a process of its own."""
    command = [sys.executable, __file__, "--near-only", "--documents", str(arguments.documents)]
    command += ["--speeches", str(arguments.speeches), "--plays", str(arguments.plays), "--work-dir", str(work)]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    return NearResult(**json.loads(result.stdout))


def measure_near(arguments: argparse.Namespace) -> NearResult:
    """Six documents of ten share nothing, one shares half of its text, three are copies, 1, 2 and 5 % edited."""
    import resource

    import numpy as np

    from megatron_7b.prepare.corpus_sections import DuplicatesSection
    from megatron_7b.prepare.duplicates.near import NearDuplicates

    rng = random.Random(7)
    words = [
        word
        for file in (arguments.speeches, arguments.plays)
        for text in planted_corpus.cut_passages(file)
        for word in text.split()
    ]
    tenth = arguments.documents // 10
    texts = [" ".join(shuffle_phrases(words, rng)) for _ in range(6 * tenth)]
    texts += [
        f"{text[: len(text) // 2]} {' '.join(shuffle_phrases(words, rng))[: len(text) // 2]}" for text in texts[:tenth]
    ]
    originals = {}
    for share in (0.01, 0.02, 0.05):
        for _ in range(tenth):
            originals[len(texts)] = rng.randrange(6 * tenth)
            texts.append(replace_words(texts[originals[len(texts)]], share, words, rng))
    finder = NearDuplicates(DuplicatesSection())
    started, cpu_started = time.perf_counter(), time.process_time()
    signatures = finder.sign(texts)
    signed = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=arguments.work_dir) as name:
        file = Path(name) / "signatures.npy"
        np.save(file, signatures)
        keepers = finder.find_keepers([file], np.ones(len(texts), dtype=np.bool_), Path(name))
    found, cpu_seconds = time.perf_counter(), time.process_time() - cpu_started
    gone = keepers != np.arange(len(texts))
    right = np.array([gone[copy] for copy in originals])
    return NearResult(
        len(texts),
        sum(map(len, texts)) / 1e6,
        signed - started,
        found - signed,
        cpu_seconds,
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        {
            f"{share:.0%}": float(right[place * tenth : (place + 1) * tenth].mean())
            for place, share in enumerate((0.01, 0.02, 0.05))
        },
        float(right.sum() / max(1, gone.sum())),
        float(gone[6 * tenth : 7 * tenth].mean()),
    )


def shuffle_phrases(words: Sequence[str], rng: random.Random) -> list[str]:
    """Return a hundred to four hundred words, in phrases of three to eight from the books."""
    size, chosen = rng.randint(100, 400), []
    while len(chosen) < size:
        start = rng.randrange(len(words) - 8)
        chosen += words[start : start + rng.randint(3, 8)]
    return chosen


def replace_words(text: str, share: float, words: Sequence[str], rng: random.Random) -> str:
    """Each word is another one with a probability of `share`."""
    return " ".join(rng.choice(words) if rng.random() < share else word for word in text.split())


# -------------------------------------------------------------------------------------------------------------- tables


def format_results(planted: PlantedResult, near: NearResult, arguments: argparse.Namespace) -> str:
    """Both tables with the day and the machine."""
    machine = f"{platform.machine()}, {arguments.workers} workers on {os.cpu_count()} cores"
    python = f"Python {platform.python_version()}, load {os.getloadavg()[0]:.1f}"
    seconds = near.sign_seconds + near.find_seconds
    rows = [
        f"| {finding.kind} | {finding.planted:,} | {finding.found:,} | {finding.wrong:,} |"
        for finding in planted.findings[:-1]
    ]
    clean = planted.findings[-1]
    lines = [
        f"## {dt.datetime.now(tz=dt.UTC):%Y-%m-%d}, {machine}, {python}",
        "",
        f"`{' '.join(['tools/benchmarks/prepare.py', *sys.argv[1:]])}`",
        "",
        "| | planted | found | wrongly dropped |",
        "|---|---|---|---|",
        *rows,
        f"| {clean.kind} | {clean.planted:,} | | {clean.wrong:,} |",
        "",
        f"{planted.megabytes:.1f} MB of files in {planted.wall_seconds:.1f} s and {planted.cpu_seconds:.1f} s of CPU, "
        f"start-up included; largest process {planted.peak_mib:.0f} MiB. Dropped: "
        + ", ".join(f"{reason} {count:,}" for reason, count in planted.reasons.items())
        + ".",
        "",
        "| stage | documents | M characters | s of one core | MB/s | MiB |",
        "|---|---|---|---|---|---|",
        *(_stage_row(stage) for stage in planted.stages),
        "",
        (
            f"Near duplicates alone, {near.documents:,} documents, {near.megabytes:.0f} MB: signatures "
            f"{near.sign_seconds:.1f} s, decision {near.find_seconds:.1f} s, together {seconds:.1f} s "
            f"({near.megabytes / seconds:.1f} MB/s) and {near.cpu_seconds:.1f} s of CPU, {near.peak_mib:.0f} MiB with "
            "the texts in memory."
        ),
        "",
        "| recall at "
        + " | at ".join(near.recall)
        + " of words edited | precision | dropped of those that share a half |",
        "|---" * (len(near.recall) + 2) + "|",
        "| "
        + " | ".join(f"{value:.4f}" for value in near.recall.values())
        + f" | {near.precision:.4f} | {near.halves_dropped:.4f} |",
        "",
    ]
    return "\n".join(lines)


def _stage_row(stage: dict[str, Any]) -> str:
    millions, seconds = stage["characters_in"] / 1e6, stage["seconds"]
    speed = f"{millions / seconds:.1f}" if seconds else "–"
    memory = f"{stage['peak_memory'] / 2**20:.0f}" if stage["peak_memory"] else "–"
    return f"| {stage['name']} | {stage['documents_in']:,} | {millions:.1f} | {seconds:.2f} | {speed} | {memory} |"


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    assets = REPOSITORY / ".cache" / "assets"
    parser.add_argument("--speeches", type=Path, default=assets / "sotu.jsonl", help="JSONL of prose, key text")
    parser.add_argument("--plays", type=Path, default=assets / "shakespeare.jsonl", help="JSONL of plays, key text")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the books, and of what is planted")
    parser.add_argument("--documents", type=int, default=100_000, help="for near duplicates alone")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--work-dir", type=Path, help="where files are meanwhile (default: the temporary folder)")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="copy raw files and result there, for a look at them")
    parser.add_argument("--json", action="store_true", help="print figures only, as JSON")
    parser.add_argument("--output", type=Path, default=RESULTS, help="markdown file to append to; - for none")
    parser.add_argument("--near-only", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    for file in (arguments.speeches, arguments.plays):
        if not file.exists():
            parser.error(
                f"{file} does not exist; tools/fetch_sotu.py writes speeches, any JSONL with the key text will do"
            )
    return arguments


if __name__ == "__main__":
    if "--near-only" in sys.argv:
        print(json.dumps(asdict(measure_near(_parse_arguments()))))
        sys.exit(0)
    sys.exit(main())
