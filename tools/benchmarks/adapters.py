#!/usr/bin/env python3
"""Adapters beside full fine-tuning: tokens a second, memory, and the size of a checkpoint, on a CPU.

    python tools/benchmarks/adapters.py --output /tmp/adapters --config mini_cpu

Every method takes its turn in each round, on random tokens, from one base; medians over the steps of all rounds but the
first two of each run. Memory is the peak of the process.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

from megatron_7b.data import IndexWriter  # noqa: E402  # after the path is set, for a checkout without an install

METHODS = ("none", "lora", "dora", "bottleneck")
SKIPPED_STEPS = 2


@dataclass
class Measured:
    """What the runs of one method have shown."""

    seconds: list[float] = field(default_factory=list)
    tokens: int = 0
    memory_bytes: int = 0
    checkpoint_bytes: int = 0


def write_corpus(folder: Path) -> str:
    """Write random tokens, and return the prefix."""
    prefix = str(folder / "random_text_document")
    random, writer = np.random.default_rng(5), IndexWriter(prefix, 2)
    for _ in range(400):
        writer.add_document(random.integers(0, 32000, 1000).astype(np.uint16))
    writer.finish()
    return prefix


def pretrain(run: Path, config: str, corpus: str, steps: int, *more: str) -> None:
    """Run `megatron-7b pretrain` to its end."""
    options = {
        "config": config, "run-dir": run, "data.train": corpus, "training.train-steps": steps, "training.seed": 1,
        "data.split": "100,0,0", "telemetry.plot": False, "telemetry.tensorboard": False,
        "optimizer.lr-warmup-steps": 0,
    }  # fmt: skip
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "megatron_7b", "pretrain", *words, *more]
    subprocess.run(command, check=True, cwd=REPOSITORY, capture_output=True)


def measure(run: Path, into: Measured) -> None:
    """Add what a run has left in its folder."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "step_seconds" in line]
    into.seconds += [line["step_seconds"] for line in steps[SKIPPED_STEPS:]]
    into.tokens = steps[0]["consumed_tokens"]
    into.memory_bytes = max(into.memory_bytes, *(line["memory_bytes"] for line in steps))
    checkpoint = (run / "checkpoints" / "latest").resolve()
    into.checkpoint_bytes = sum(file.stat().st_size for file in checkpoint.rglob("*") if file.is_file())


def main() -> None:
    """Run all methods in turn, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for runs; what is there is removed")
    parser.add_argument("--config", default="mini_cpu")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=8)
    arguments, more = parser.parse_known_args()
    shutil.rmtree(arguments.output, ignore_errors=True)
    arguments.output.mkdir(parents=True)
    corpus = write_corpus(arguments.output)
    base = arguments.output / "base"
    pretrain(base, arguments.config, corpus, 1, *more, "--checkpoint.save-optimizer", "False")
    measured = {method: Measured() for method in METHODS}
    for number in range(arguments.rounds):
        for method, result in measured.items():
            run = arguments.output / f"{method}-{number}"
            start = ("--checkpoint.initialize-from", str(base), "--adapter.method", method)
            pretrain(run, arguments.config, corpus, arguments.steps, *more, *start)
            measure(run, result)
    print("| adapter | tokens/s | step | peak memory | checkpoint |\n|---|---|---|---|---|")
    whole = statistics.median(measured["none"].seconds)
    for method, result in measured.items():
        seconds = statistics.median(result.seconds)
        print(
            f"| {method} | {result.tokens / seconds:.0f} | {seconds:.2f} s ({whole / seconds:.2f} times as fast) | "
            f"{result.memory_bytes / 1e9:.2f} GB | {result.checkpoint_bytes / 1e6:.1f} MB |"
        )


if __name__ == "__main__":
    main()
