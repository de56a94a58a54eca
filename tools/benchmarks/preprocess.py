#!/usr/bin/env python3
"""How fast text becomes tokens: whole processes, timed from outside, for each tokenizer, engine and size.

    tools/benchmarks/preprocess.py --output -                                # ours, on 128 MB
    tools/benchmarks/preprocess.py --size-mb 128 2048 --megatron-lm DIR      # writes docs/benchmarks/preprocess.md

The corpus is the given JSONL files and the standard library's sources, repeated to the size asked for. `--megatron-lm`
names a checkout of Megatron-LM, whose two tools then take turns with ours on the smallest size, and whose output is
compared with ours. Everything runs once unmeasured (byte code, page cache), then in rounds, one of each per round; the
table has medians, and ratios within a round.
"""

import argparse
import datetime as dt
import filecmp
import json
import os
import platform
import runpy
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

REPOSITORY = Path(__file__).resolve().parents[2]
RESULTS = REPOSITORY / "docs" / "benchmarks" / "preprocess.md"
BEGIN, END = "<!-- timings: written by tools/benchmarks/preprocess.py -->\n", "<!-- end of timings -->\n"
ENGINES = ("auto", "fastokens", "gigatoken", "tokenizers")


@dataclass(frozen=True)
class Timing:
    """One run of a whole command."""

    wall_seconds: float
    cpu_seconds: float
    peak_mib: float
    """Of the largest process."""


@dataclass
class Contestant:
    """A command that writes PREFIX_text_document from a corpus."""

    name: str
    tokenizer: Path
    corpus: Path
    prefix: Path
    command: list[str]
    search_path: Path | None = None
    """PYTHONPATH, for Megatron-LM's tools."""
    timings: list[Timing] = field(default_factory=list)

    def run(self) -> Timing:
        """One process from start to end, with what the kernel counted for it and its children."""
        environment = {**os.environ, **({} if self.search_path is None else {"PYTHONPATH": str(self.search_path)})}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        options = ["--input", str(self.corpus), "--output-prefix", str(self.prefix)]
        options += ["--tokenizer-model", str(self.tokenizer), "--append-eod"]
        command = [sys.executable, *self.command, *options]
        with tempfile.TemporaryFile() as said:
            start = time.perf_counter()
            process = subprocess.Popen(command, stdout=said, stderr=said, env=environment, cwd=self.search_path)
            _, status, usage = os.wait4(process.pid, 0)
            wall = time.perf_counter() - start
            process.returncode = os.waitstatus_to_exitcode(status)
            if process.returncode:
                said.seek(0)
                sys.stderr.buffer.write(said.read())
                raise subprocess.CalledProcessError(process.returncode, command)
        return Timing(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024)

    @property
    def megabytes(self) -> float:
        """Size of its corpus."""
        return self.corpus.stat().st_size / 1e6


def main() -> int:
    """Build the corpora, run all contestants in turn, print and write the table."""
    arguments = _parse_arguments()
    with tempfile.TemporaryDirectory(dir=arguments.work_dir) as name:
        work = Path(name)
        rows = []
        for size in sorted(arguments.size_mb):
            contestants = _enter(arguments, work, size)
            for contestant in contestants:
                contestant.run()
            for _ in range(arguments.repeats):
                for contestant in contestants:
                    contestant.timings.append(contestant.run())
            rows += [format_row(contestant, contestants) for contestant in contestants]
            for file in work.glob(f"*-{size:g}*"):
                if file.is_file():
                    file.unlink()
    table = format_table(rows, arguments)
    print(table)
    if arguments.output != Path("-"):
        replace_timings(arguments.output, table)
    return 0


def _enter(arguments: argparse.Namespace, work: Path, size: float) -> list[Contestant]:
    """Who runs on this size: our engines, and on the smallest size Megatron-LM's tools."""
    tool, workers = str(REPOSITORY / "tools" / "preprocess_data.py"), str(arguments.workers)
    corpus = write_corpus(arguments.input, work / f"corpus-{size:g}.jsonl", size)
    tokenizers = arguments.tokenizer_model
    if not tokenizers:
        tokenizers = [work / "bpe-32k"]
        if not tokenizers[0].exists():
            train_tokenizer(write_corpus(arguments.input, work / "sample.jsonl", 16), tokenizers[0])
    part = _cut(corpus, arguments.reference_mb)
    entries: list[tuple[str, list[str], Path, Path | None]] = []
    for engine in arguments.engines:
        command = [tool, "--overwrite", "--engine", engine, "--workers", workers]
        entries.append((f"ours, {engine}", command, part if engine == "tokenizers" else corpus, None))
    if arguments.megatron_lm is not None and size == min(arguments.size_mb):
        folder, kind = arguments.megatron_lm.resolve(), ["--tokenizer-type", "HuggingFaceTokenizer"]
        fast, default = (str(folder / "tools" / f"{name}.py") for name in ("preprocess_data_fast", "preprocess_data"))
        part = _cut(corpus, arguments.default_tool_mb or size)
        entries.append(("Megatron-LM, fast tool", [fast, *kind, "--use-gigatoken"], corpus, folder))
        entries.append(("Megatron-LM, default tool", [default, *kind, "--workers", workers], part, folder))
    return [
        Contestant(name, tokenizer, text, work / f"{tokenizer.name}-{number}-{size:g}", command, search_path)
        for tokenizer in tokenizers
        for number, (name, command, text, search_path) in enumerate(entries)
    ]


def _cut(corpus: Path, size_mb: float) -> Path:
    """Return the corpus's first lines, this many MB of them."""
    if corpus.stat().st_size <= size_mb * 1e6:
        return corpus
    part = corpus.with_name(f"first-{size_mb:g}-of-{corpus.name.removeprefix('corpus-')}")
    if not part.exists():
        with corpus.open("rb") as stream:
            part.write_bytes(b"".join(stream.readlines(int(size_mb * 1e6))))
    return part


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


def format_row(contestant: Contestant, contestants: Sequence[Contestant]) -> str:
    """A row of the table; the first contestant on the same tokenizer is what the others are compared with."""
    ours = next(one for one in contestants if one.tokenizer == contestant.tokenizer)
    wall = [timing.wall_seconds for timing in contestant.timings]
    median, megabytes = statistics.median(wall), contestant.megabytes
    cpu = statistics.median(timing.cpu_seconds for timing in contestant.timings)
    ratios = [
        (theirs.wall_seconds / megabytes) / (first.wall_seconds / ours.megabytes)
        for theirs, first in zip(contestant.timings, ours.timings, strict=True)
    ]
    ratio = "1" if contestant is ours else f"{statistics.median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f})"
    peak = max(timing.peak_mib for timing in contestant.timings)
    tokens = len(_read_ids(contestant.prefix))
    return (
        f"| {contestant.tokenizer.name} | {contestant.name} | {megabytes:.0f} | {median:.2f} ({min(wall):.2f} to "
        f"{max(wall):.2f}) | {cpu:.2f} | {megabytes / median:.1f} | {megabytes / cpu:.1f} | "
        f"{tokens / median / 1e6:.2f} | {peak:.0f} | {ratio} | {compare(contestant, ours)} |"
    )


def compare(contestant: Contestant, ours: Contestant) -> str:
    """Whether both wrote the same bytes, in words."""
    if contestant is ours:
        manifest = json.loads(Path(f"{ours.prefix}_text_document.json").read_text())
        return f"by {manifest['engine']['name']}"
    if contestant.corpus != ours.corpus:  # ours writes that part once more, to compare with
        command = [*ours.command[:1], "--overwrite"]
        ours = Contestant(ours.name, ours.tokenizer, contestant.corpus, ours.prefix.with_name("part"), command)
        ours.run()
    files = [[Path(f"{one.prefix}_text_document{end}") for one in (contestant, ours)] for end in (".bin", ".idx")]
    if all(filecmp.cmp(*pair, shallow=False) for pair in files):
        return "same bytes"
    ids, lengths = _read_ids(contestant.prefix), _read_lengths(contestant.prefix)
    starts = np.cumsum(lengths) - lengths
    eod = _read_ids(ours.prefix)[-1]
    lone = (lengths == 1) & (ids[starts] == eod)
    same_ids = np.array_equal(np.delete(ids, starts[lone]), _read_ids(ours.prefix))
    if same_ids and np.array_equal(lengths[~lone], _read_lengths(ours.prefix)):
        return f"same but for {int(lone.sum())} empty documents, which are an end-of-document token there"
    return "**different**"


def _read_lengths(prefix: Path) -> np.ndarray:
    """Tokens of each sequence, from the .idx [sequences]."""
    header = np.fromfile(f"{prefix}_text_document.idx", np.uint8, 34)
    return np.fromfile(f"{prefix}_text_document.idx", np.int32, int(header[18:26].view(np.int64)[0]), offset=34)


def _read_ids(prefix: Path) -> np.ndarray:
    """All ids of a corpus, from the .bin [tokens]."""
    code = int(np.fromfile(f"{prefix}_text_document.idx", np.uint8, 18)[17])
    return np.fromfile(f"{prefix}_text_document.bin", {4: np.int32, 8: np.uint16}[code])


def format_table(rows: Sequence[str], arguments: argparse.Namespace) -> str:
    """The table with the day and the machine."""
    theirs = "" if arguments.megatron_lm is None else f"; Megatron-LM {_describe_checkout(arguments.megatron_lm)}"
    told = (
        f"{dt.datetime.now(tz=dt.UTC):%Y-%m-%d}, {platform.machine()}, {arguments.workers} workers on "
        f"{os.cpu_count()} cores, Python {platform.python_version()}, load {os.getloadavg()[0]:.1f}{theirs}. Whole "
        f"processes, start-up included: medians of {arguments.repeats} rounds (least to greatest)."
    )
    head = (
        "| tokenizer | tool | MB | wall s | CPU s | MB/s | MB per CPU s | M tokens/s | peak MiB | s per MB, times ours "
        "| output |"
    )
    return "\n".join([told, "", head, "|---" * 11 + "|", *rows, ""])


def _describe_checkout(folder: Path) -> str:
    command = ["git", "-C", str(folder), "rev-parse", "--short=10", "HEAD"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    if found.returncode == 0 and (folder / ".git").exists():
        return found.stdout.strip()
    return str(runpy.run_path(str(folder / "megatron" / "core" / "package_info.py"))["__version__"])


def replace_timings(page: Path, table: str) -> None:
    """Put the table where the page has its former one."""
    text = page.read_text()
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{page} has no lines {BEGIN.strip()} and {END.strip()} to write the table between")
    page.write_text(f"{before}{begin}\n{table}\n{end}{after}")


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    assets = sorted((REPOSITORY / ".cache" / "assets").glob("*.jsonl"))
    parser.add_argument("--input", nargs="+", type=Path, default=assets, help="JSONL files with the key text")
    parser.add_argument("--size-mb", nargs="+", type=float, default=[128])
    parser.add_argument("--reference-mb", type=float, default=16, help="size for the reference engine, which is slow")
    parser.add_argument("--tokenizer-model", nargs="+", type=Path, help="default: a BPE of 32,000 tokens is trained")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=["auto", "gigatoken", "tokenizers"])
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--megatron-lm", type=Path, metavar="DIR", help="checkout whose tools are measured as well")
    parser.add_argument("--default-tool-mb", type=float, help="size for its slow default tool (default: the smallest)")
    parser.add_argument("--work-dir", type=Path, help="where the corpus is meanwhile (default: the temporary folder)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="page whose timings are replaced; - for none")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
