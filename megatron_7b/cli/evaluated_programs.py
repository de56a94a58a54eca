"""`megatron-7b evaluate --pass-at 1,10 --data humaneval.jsonl`: programs that a checkpoint writes, run and judged."""

import argparse
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_7b.checkpoint.evaluations import with_weights
from megatron_7b.cli.checkpoint_command import CheckpointCommand
from megatron_7b.cli.kept_figures import check_can_keep, command_of, keep
from megatron_7b.cli.options import CommandLine, Parser
from megatron_7b.cli.progress import LineProgress
from megatron_7b.cli.tables import align
from megatron_7b.errors import ConfigError
from megatron_7b.evaluation.harness import TaskResults
from megatron_7b.evaluation.programs.evaluating import (
    ProgramOptions,
    ProgramResults,
    read_program_task,
    run_program_task,
    write_samples,
)
from megatron_7b.evaluation.programs.problems import holds_problems
from megatron_7b.generation.setup import REQUIREMENTS, read_setup
from megatron_7b.runtime.confinement.running import Limits, isolation_here
from megatron_7b.runtime.output_paths import check_file_to_write
from megatron_7b.runtime.process.logs import configure_logging

_ISOLATED, _NOT_ISOLATED = "isolated", "without-isolation"


def add_program_flags(parser: Parser) -> None:
    """Add the options of programs; `--max-new-tokens`, `--limit`, `--batch-size` and `--output` are shared."""
    programs = parser.add_argument_group("programs written for the problems of a JSONL file (HumanEval, MBPP)")
    programs.add_argument("--pass-at", metavar="K,K", help="the k of pass@k, such as 1,10; default: 1")
    programs.add_argument("--num-samples", type=int, metavar="N", help="programs for each problem; default: largest k")
    programs.add_argument(
        "--allow-code-execution", nargs="?", const=_ISOLATED, choices=(_ISOLATED, _NOT_ISOLATED), metavar="HOW",
        help="run what the model writes: isolated (no network, files or processes; refused where that cannot be had) "
        f"or {_NOT_ISOLATED}",
    )  # fmt: skip
    programs.add_argument("--program-seconds", type=float, default=10.0, metavar="S", help="time of each program")
    programs.add_argument("--temperature", type=float, metavar="T", help="default: greedy, or 0.8 for several samples")
    programs.add_argument("--top-p", type=float, metavar="P", help="default: all, or 0.95 for several samples")
    programs.add_argument("--seed", type=int, default=1234, help="the same seed gives the same programs")


def names_problems(flags: argparse.Namespace) -> bool:
    """Whether a command asks for programs: by an option, or by a file that holds problems."""
    if flags.pass_at is not None or flags.allow_code_execution is not None:
        return True
    return flags.data is not None and Path(flags.data).is_file() and holds_problems(Path(flags.data))


def evaluate_on_programs(command_line: CommandLine, argv: list[str]) -> int:
    """Run the command; returns 0 when all programs were judged.

    Raises:
        MegatronError: Before any model is built where possible.
    """
    flags = command_line.flags
    options = _options(flags)
    command = CheckpointCommand.read(command_line, REQUIREMENTS)
    setup = read_setup(command.folder, command.config)
    if flags.output is not None:
        check_file_to_write(flags.output, "--output")
    check_can_keep(flags, command.folder)
    task = read_program_task(setup, Path(flags.data), options)
    if not command.runs_here:
        return command.launch("evaluate", argv)
    configure_logging(int(os.environ.get("RANK", "0")))
    lines: dict[str, LineProgress] = {}

    def report(what: str, done: int, total: int) -> None:
        lines.setdefault(what, LineProgress(what)).update(done, total)

    results = run_program_task(task, fp32_on_cpu=command.fp32_on_cpu, report=report)
    if results is not None:
        _tell(results, flags, with_weights(_content(results, flags, argv), command.folder), command.folder)
    return 0


def _options(flags: argparse.Namespace) -> ProgramOptions:
    if flags.allow_code_execution is None:
        raise ConfigError(
            f"{flags.data} holds problems that are judged by running the programs which the model writes, and nobody "
            "has read these",
            hint="--allow-code-execution runs them, kept from network, files and other processes",
        )
    try:
        pass_at = tuple(sorted({int(one) for one in (flags.pass_at or "1").split(",")}))
    except ValueError:
        raise ConfigError(f"--pass-at is {flags.pass_at!r}, expected numbers such as 1,10") from None
    longest = {} if flags.max_new_tokens is None else {"max_new_tokens": flags.max_new_tokens}
    return ProgramOptions(
        pass_at=pass_at,
        num_samples=flags.num_samples,
        temperature=flags.temperature,
        top_p=flags.top_p,
        seed=flags.seed,
        batch_size=flags.batch_size,
        limits=Limits(seconds=flags.program_seconds, must_isolate=flags.allow_code_execution == _ISOLATED),
        limit=flags.limit,
        **longest,
    )


def _tell(results: ProgramResults, flags: argparse.Namespace, content: Mapping[str, Any], folder: Path) -> None:
    rows = [["measure", "value", "95 % interval"]]
    for k in results.pass_at:
        low, high = results.interval(k)
        rows.append([f"pass@{k}", f"{results.value(k):.4f}", f"{low:.4f} to {high:.4f}"])
    print("\n".join(align(rows, num_left=1)))
    right = sum(one.verdict.passed for one in results.samples)
    late = sum(one.verdict.result == "timed out" for one in results.samples)
    print(
        f"{len(results.counts):,} problems, {len(results.samples):,} programs, {right:,} right, {late:,} out of time; "
        f"{results.seconds_writing:.1f} s of writing, {results.seconds_judging:.1f} s of judging"
    )
    if flags.output is not None:
        samples = flags.output.with_suffix(".samples.jsonl")
        TaskResults(content).write(flags.output)
        write_samples(samples, results)
        print(f"figures are in {flags.output}, programs in {samples}")
    if flags.keep:
        keep(folder, f"programs-{Path(flags.data).stem}", content)
    if flags.json:
        print(json.dumps({**results.measures(), "problems": len(results.counts), "programs": len(results.samples)}))


def _content(results: ProgramResults, flags: argparse.Namespace, argv: list[str]) -> Mapping[str, Any]:
    """Return everything in the form of results of tasks, which `compare` and model cards read."""
    figures: dict[str, float | int] = {}
    for k in results.pass_at:
        estimates = results.estimates(k)
        mean, number = results.value(k), len(estimates)
        spread = sum((one - mean) ** 2 for one in estimates) / max(1, number - 1)
        figures |= {f"pass@{k},none": mean, f"pass@{k}_stderr,none": (spread / number) ** 0.5}
    isolation = isolation_here()
    return {
        "results": {Path(flags.data).stem: figures},
        "date": time.time(),
        "command": command_of(argv),
        "problems": {name: {"programs": count, "right": right} for name, (count, right) in results.counts.items()},
        "isolation": {name: getattr(isolation, name) for name in ("calls", "files", "network", "folder")},
    }
