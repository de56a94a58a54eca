"""`megatron-7b evaluate --tasks`: tasks of lm-evaluation-harness on a checkpoint."""

import argparse
import json
import os
import time
from pathlib import Path

from megatron_7b.checkpoint.evaluations import with_weights
from megatron_7b.cli.checkpoint_command import CheckpointCommand
from megatron_7b.cli.kept_figures import check_can_keep, command_of, keep
from megatron_7b.cli.options import CommandLine, Parser
from megatron_7b.cli.progress import LineProgress
from megatron_7b.cli.tables import align
from megatron_7b.evaluation.harness import HarnessOptions, TaskResults, evaluate_tasks
from megatron_7b.evaluation.harness.running import check_harness
from megatron_7b.generation.setup import REQUIREMENTS, read_setup
from megatron_7b.runtime.output_paths import check_file_to_write
from megatron_7b.runtime.process.logs import configure_logging


def add_task_flags(parser: Parser) -> None:
    """Add the options that tasks have."""
    tasks = parser.add_argument_group("tasks of lm-evaluation-harness")
    tasks.add_argument("--tasks", metavar="A,B", help="tasks, groups, tags, or YAML files; instead of --data")
    tasks.add_argument(
        "--task-data",
        type=Path,
        metavar="DIR",
        help="folder with data sets, as DIR/hellaswag/validation.jsonl",
    )
    tasks.add_argument(
        "--include-path", type=Path, action="append", default=[], metavar="DIR", help="folder with tasks of your own"
    )
    tasks.add_argument("--allow-download", action="store_true", help="fetch data sets that are not here from the hub")
    tasks.add_argument("--num-fewshot", type=int, metavar="N", help="examples before each question")
    tasks.add_argument("--limit", type=int, metavar="N", help="only the first N questions of each task, or texts")
    tasks.add_argument("--apply-chat-template", action="store_true", help="put questions into the chat template")
    tasks.add_argument("--system-instruction", metavar="TEXT", help="system message of each question")
    tasks.add_argument("--gen-kwargs", metavar="K=V,…", help="for tasks that generate, such as max_gen_toks=64")
    tasks.add_argument("--batch-size", type=int, default=16, metavar="N", help="texts that share a forward pass")
    tasks.add_argument("--output", type=Path, metavar="FILE", help="file for everything that was found")
    tasks.add_argument("--report", type=Path, metavar="FILE", help="HTML page: figures, calibration, worst questions")
    tasks.add_argument("--log-samples", action="store_true", help="have --output hold every question and its answers")


def evaluate_on_tasks(command_line: CommandLine, argv: list[str]) -> int:
    """Run the command; returns 0 when all tasks were done.

    Raises:
        MegatronError: Before any model is built where possible.
    """
    flags = command_line.flags
    options = _options(flags)
    check_harness()
    command = CheckpointCommand.read(command_line, REQUIREMENTS)
    if flags.output is not None:
        check_file_to_write(flags.output, "--output")
    if flags.report is not None:
        check_file_to_write(flags.report, "--report")
    check_can_keep(flags, command.folder)
    setup = read_setup(command.folder, command.config)
    setup.check_scores()
    if not command.runs_here:
        return command.launch("evaluate", argv)
    rank = int(os.environ.get("RANK", "0"))
    configure_logging(rank)
    started = time.perf_counter()
    lines: dict[str, LineProgress] = {}

    def report(what: str, done: int, total: int) -> None:
        lines.setdefault(what, LineProgress(f"requests {what}")).update(done, total)

    results = evaluate_tasks(setup, options, fp32_on_cpu=command.fp32_on_cpu, report=report)
    if results is not None:
        content = {**results.content, "command": command_of(argv)}
        results = TaskResults(with_weights(content, command.folder))
        _tell(results, flags, command.folder, seconds=time.perf_counter() - started)
    return 0


def _options(flags: argparse.Namespace) -> HarnessOptions:
    return HarnessOptions(
        tasks=_names(flags),
        include_path=tuple(flags.include_path),
        task_data=flags.task_data,
        allow_download=flags.allow_download,
        num_fewshot=flags.num_fewshot,
        limit=flags.limit,
        apply_chat_template=flags.apply_chat_template,
        system_instruction=flags.system_instruction,
        gen_kwargs=flags.gen_kwargs,
        log_samples=flags.log_samples or flags.report is not None,
        batch_size=flags.batch_size,
    )


def _names(flags: argparse.Namespace) -> tuple[str, ...]:
    return tuple(name.strip() for name in flags.tasks.split(",") if name.strip())


def _tell(results: TaskResults, flags: argparse.Namespace, folder: Path, *, seconds: float) -> None:
    print("\n".join(align(_rows(results), num_left=1)), flush=True)  # before a file that a full disk may not take
    if flags.output is not None:
        results.write(flags.output)
    if flags.keep:
        keep(folder, "tasks-" + "+".join(sorted(_names(flags))), results.content)
    if flags.report is not None:
        from megatron_7b.evaluation.report import write_report

        write_report(flags.report, results.content)
    print(f"{seconds:.1f} s" + (f"; everything is in {flags.output}" if flags.output is not None else ""))
    if flags.json:
        figures = {
            f"{one.task}/{one.name}" + (f"/{one.filter}" if one.filter else ""): one.value for one in results.measures()
        }
        print(json.dumps(figures))


def _rows(results: TaskResults) -> list[list[str]]:
    rows = [["task", "version", "shots", "measure", "value", "± standard error"]]
    for one in results.measures():
        shots, error = (
            "" if value is None else f"{value:{form}}" for value, form in ((one.shots, "d"), (one.error, ".4f"))
        )
        rows.append([one.task, one.version, shots, one.title, f"{one.value:.4f}", error])
    return rows
