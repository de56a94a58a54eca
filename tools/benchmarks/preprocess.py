#!/usr/bin/env python3
"""How fast text becomes tokens: whole processes, timed from outside, for each tokenizer and engine.

    tools/benchmarks/preprocess.py --size-mb 128                    # writes docs/benchmarks/preprocess.md
    tools/benchmarks/preprocess.py --size-mb 2048 --engines auto --output -

The corpus is the given JSONL files and the standard library's sources, repeated to the size asked for.
"""

import argparse
import datetime as dt
import json
import os
import platform
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
RESULTS = REPOSITORY / "docs" / "benchmarks" / "preprocess.md"
ANCHORS = (
    "Megatron-LM's tools, measured on the same kind of machine when nothing else ran: `preprocess_data_fast.py` 6.6 s "
    "for 128 MB, `preprocess_data.py` 4.6 MB/s."
)
ENGINES = ("auto", "fastokens", "gigatoken", "tokenizers")


@dataclass(frozen=True)
class Timing:
    """One run of the whole command."""

    tokenizer: str
    engine: str
    megabytes: float
    tokens: int
    wall_seconds: float
    cpu_seconds: float
    peak_mib: float

    def to_row(self) -> str:
        """A row of the table."""
        return (
            f"| {self.tokenizer} | {self.engine} | {self.megabytes:.0f} | {self.wall_seconds:.2f} | "
            f"{self.cpu_seconds:.2f} | {self.megabytes / self.wall_seconds:.1f} | "
            f"{self.megabytes / self.cpu_seconds:.1f} | {self.tokens / self.wall_seconds / 1e6:.2f} | "
            f"{self.peak_mib:.0f} |"
        )


def main() -> int:
    """Build the corpus, run all combinations, print and write the table."""
    arguments = _parse_arguments()
    with tempfile.TemporaryDirectory(dir=arguments.work_dir) as name:
        work = Path(name)
        corpus = write_corpus(arguments.input, work / "corpus.jsonl", arguments.size_mb)
        small = write_corpus(arguments.input, work / "small.jsonl", min(arguments.size_mb, arguments.reference_mb))
        tokenizers = arguments.tokenizer_model or [train_tokenizer(small, work / "bpe-32k")]
        timings = []
        for tokenizer in tokenizers:
            for engine in arguments.engines:
                text = small if engine == "tokenizers" else corpus
                timings += [best_of(arguments.repeats, tokenizer, engine, text, work, arguments.workers)]
    table = format_table(timings, arguments)
    print(table)
    if arguments.output != Path("-"):
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        previous = arguments.output.read_text() if arguments.output.exists() else "# Preprocessing, measured\n"
        arguments.output.write_text(f"{previous}\n{table}")
    return 0


def write_corpus(inputs: Sequence[Path], file: Path, size_mb: float) -> Path:
    """Write the inputs and the standard library's sources as JSONL, again and again until the size is reached.

    Each time differs from the others: other digits, and words that occur in no other repetition.
    """
    lines = [line for path in inputs for line in path.read_bytes().splitlines()]
    for source in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        if "site-packages" not in source.parts:
            text = source.read_text(encoding="utf-8", errors="replace")
            lines += [json.dumps({"text": text}).encode()]
    wanted, written, repetition = int(size_mb * 1e6), 0, 0
    with file.open("wb") as stream:
        while written < wanted:
            for line in lines[:: 1 if written or size_mb > 100 else 3]:  # a small corpus still has all kinds of text
                written += stream.write(_vary(line, repetition) + b"\n")
                if written >= wanted:
                    break
            repetition += 1
    return file


def _vary(line: bytes, repetition: int) -> bytes:
    if not repetition:
        return line
    # Neither touches an escape: \\u00e9 would become another character, \\u00x9 none at all.
    digits = bytes((digit + repetition) % 10 + 48 for digit in range(10))
    pieces = line.split(b"\\u")
    pieces[0] = pieces[0].translate(bytes.maketrans(b"0123456789", digits))
    coined = b" " + "".join(chr(97 + (repetition * 7 + step * 5) % 26) for step in range(2 + repetition % 7)).encode()
    return b"\\u".join(pieces).replace(b" people ", coined + b" people ").replace(b" self ", coined + b" self ")


def train_tokenizer(corpus: Path, folder: Path) -> Path:
    """A byte-level BPE of 32,000 tokens."""
    arguments = ["tokenizer", "train", "--input", str(corpus), "--vocab-size", "32000", "--output", str(folder)]
    subprocess.run([sys.executable, "-m", "megatron_7b", *arguments], check=True, cwd=REPOSITORY)
    return folder


def best_of(repeats: int, tokenizer: Path, engine: str, corpus: Path, work: Path, workers: int) -> Timing:
    """The fastest of several runs: the others were disturbed."""
    timings = [run_once(tokenizer, engine, corpus, work, workers) for _ in range(repeats)]
    return min(timings, key=lambda timing: timing.wall_seconds)


def run_once(tokenizer: Path, engine: str, corpus: Path, work: Path, workers: int) -> Timing:
    """One process from start to end, with what the kernel counted for it."""
    command = [sys.executable, str(REPOSITORY / "tools" / "preprocess_data.py"), "--input", str(corpus), "--overwrite"]
    command += ["--output-prefix", str(work / "out"), "--tokenizer-model", str(tokenizer), "--append-eod"]
    command += ["--engine", engine, "--workers", str(workers)]
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    manifest = json.loads((work / "out_text_document.json").read_text())
    return Timing(
        tokenizer.name,
        f"{engine} ({manifest['engine']['name']})",
        corpus.stat().st_size / 1e6,
        manifest["counts"]["tokens"],
        wall,
        usage.ru_utime + usage.ru_stime,
        usage.ru_maxrss / 1024,
    )


def format_table(timings: Sequence[Timing], arguments: argparse.Namespace) -> str:
    """The table with the day and the machine."""
    load = os.getloadavg()[0]
    title = (
        f"## {dt.datetime.now(tz=dt.UTC):%Y-%m-%d}, {platform.machine()}, {arguments.workers} workers on "
        f"{os.cpu_count()} cores, Python {platform.python_version()}, load {load:.1f}"
    )
    lines = [
        title,
        "",
        f"Whole process, start-up included, best of {arguments.repeats}. {ANCHORS}",
        "",
        "| tokenizer | engine | MB | wall s | CPU s | MB/s | MB per CPU s | M tokens/s | peak MiB |",
        "|---|---|---|---|---|---|---|---|---|",
        *(timing.to_row() for timing in timings),
        "",
    ]
    return "\n".join(lines)


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    assets = sorted((REPOSITORY / ".cache" / "assets").glob("*.jsonl"))
    parser.add_argument("--input", nargs="+", type=Path, default=assets, help="JSONL files with the key text")
    parser.add_argument("--size-mb", type=float, default=128)
    parser.add_argument("--reference-mb", type=float, default=16, help="size for the reference engine, which is slow")
    parser.add_argument("--tokenizer-model", nargs="+", type=Path, help="default: a BPE of 32,000 tokens is trained")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=["auto", "gigatoken", "tokenizers"])
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--work-dir", type=Path, help="where the corpus lies meanwhile (default: the temporary folder)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="markdown file to append to; - for none")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
