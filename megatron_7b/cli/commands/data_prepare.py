"""`megatron-7b data prepare`: raw files to clean JSONL in shards, split, with a report of everything that went.

megatron-7b data prepare --input crawl/*.warc.gz books/ --output-dir clean --languages en de --quality.fineweb {}
"""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_7b.cli.options import CommandLine, Parser, add_config_flag, parse_arguments
from megatron_7b.cli.progress import continued_by_the_same_command, open_phases

if TYPE_CHECKING:
    from megatron_7b.prepare.accounting import RunReport, StageCount
    from megatron_7b.prepare.reading.inputs import Inputs
    from megatron_7b.prepare.running.run import PrepareJob, Progress

SUMMARY = "raw files to clean, deduplicated, split JSONL, with a report of everything that went"
_REASONS_SHOWN = 8


def main(argv: list[str]) -> int:
    """Run the command.

    Raises:
        MegatronError: A mistake that the user can fix.
    """
    from megatron_7b.prepare.recipe import Recipe, load_recipe

    parser = Parser(
        "data prepare", SUMMARY, with_config=True, root=Recipe, load=lambda sources: load_recipe(sources).recipe
    )
    _add_flags(parser)
    command_line = parse_arguments(parser, argv)
    return _run(command_line, argv)


def _add_flags(parser: Parser) -> None:
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="FILE",
        help="files, folders or globs: .jsonl .parquet .txt .html .warc .wet, all but parquet and html also .gz .zst",
    )
    parser.add_argument("--output-dir", required=True, metavar="DIR", help="where the corpus and its report appear")
    add_config_flag(parser)
    parser.add_argument("--workers", type=int, metavar="N", help="processes; without it, one per core")
    parser.add_argument(
        "--stall-seconds",
        type=float,
        default=600.0,
        metavar="S",
        help="end a worker that makes no progress for this long, and quarantine the document that two workers ended at",
    )
    parser.add_argument("--languages", nargs="+", metavar="CODE", help="the same as --language.languages")
    parser.add_argument("--overwrite", action="store_true", help="replace the result of another recipe in DIR")
    parser.add_argument(
        "--keep-work", action="store_true", help="keep DIR/work, so that a file added later costs only itself"
    )
    slurm = parser.add_argument_group("as Slurm jobs instead of on this machine, --workers of them at once")
    slurm.add_argument("--slurm-partition", metavar="NAME", help="submit to this partition")
    slurm.add_argument("--slurm-time", default="24:00:00", metavar="LIMIT", help="of each job")
    slurm.add_argument("--slurm-memory-gb", type=int, default=4, metavar="N", help="of each job; 0: the cluster's own")
    slurm.add_argument("--slurm-account", metavar="NAME", help="to which the time is charged")
    ray = parser.add_argument_group("on a Ray cluster instead, --workers tasks at once")
    ray.add_argument("--ray-address", metavar="ADDRESS", help="of its head; auto: this machine's; local: a new one")
    ray.add_argument("--ray-memory-gb", type=float, default=4.0, metavar="N", help="of each task")


def _run(command_line: CommandLine, argv: Sequence[str]) -> int:
    from pathlib import Path

    from megatron_7b.prepare.reading.inputs import find_inputs
    from megatron_7b.prepare.recipe import load_recipe
    from megatron_7b.prepare.running.run import PrepareJob, run_prepare

    flags, overrides = command_line.flags, dict(command_line.overrides)
    if flags.languages:
        overrides["language.languages"] = flags.languages
    book = load_recipe(flags.config, overrides, command_line.problems)
    inputs = find_inputs(flags.input)
    _note_left_out(inputs)
    job = PrepareJob(
        inputs=inputs,
        output_folder=Path(flags.output_dir),
        book=book,
        num_workers=len(os.sched_getaffinity(0)) if flags.workers is None else flags.workers,
        stall_seconds=flags.stall_seconds,
        overwrite=flags.overwrite,
        keep_work=flags.keep_work,
        command=["megatron-7b", "data", "prepare", *argv],
    )
    if flags.slurm_partition:
        return _submit(job, flags)
    with continued_by_the_same_command(), open_phases() as progress:
        report = _run_on_ray(job, flags, progress) if flags.ray_address else run_prepare(job, progress)
    _print_report(report, flags.output_dir)
    return 0


def _submit(job: "PrepareJob", flags: argparse.Namespace) -> int:
    from megatron_7b.prepare.running.slurm import SlurmOptions, submit_prepare

    options = SlurmOptions(
        partition=flags.slurm_partition,
        time_limit=flags.slurm_time,
        memory_gb=flags.slurm_memory_gb,
        account=flags.slurm_account,
        max_jobs=flags.workers,
    )
    with open_phases() as progress:
        jobs = submit_prepare(job, options, progress)
    if jobs is None:
        print(f"{job.output_folder} holds the result of this recipe and these inputs")
        return 0
    print(f"submitted jobs {' '.join(map(str, jobs))}; the last one writes {job.output_folder}/report.html")
    return 0


def _run_on_ray(job: "PrepareJob", flags: argparse.Namespace, progress: "Progress") -> "RunReport":
    from megatron_7b.prepare.running.ray_cluster import RayOptions, run_on_ray

    options = RayOptions(address=flags.ray_address, memory_gb=flags.ray_memory_gb, max_tasks=flags.workers)
    return run_on_ray(job, options, progress)


def _note_left_out(inputs: "Inputs") -> None:
    if inputs.left_out:
        kinds = ", ".join(f"{number} {ending}" for ending, number in inputs.left_out.most_common())
        print(f"note: files of no known format in the input folders are left out: {kinds}", file=sys.stderr)


def _print_report(report: "RunReport", folder: str) -> None:
    print(f"{'stage':<20}{'in':>12}{'kept':>12}{'removed':>10}{'MB/s':>9}{'memory':>10}")
    for stage in report.stages:
        print(_describe_stage(stage))
    reasons = [(count, reason) for stage in report.stages for reason, count in stage.removed.items()]
    for count, reason in sorted(reasons, key=lambda pair: (-pair[0], pair[1]))[:_REASONS_SHOWN]:
        print(f"  {count:>8,} {reason}")
    if len(reasons) > _REASONS_SHOWN:
        print(f"  and {len(reasons) - _REASONS_SHOWN} more reasons in {folder}/report.html")
    for name, counts in report.distributions.splits.items():
        if counts["documents"]:
            print(f"{name}: {counts['documents']:,} documents, {counts['characters'] / 1e6:,.2f} million characters")
    quarantined = sum(stage.quarantined for stage in report.stages)
    if quarantined:
        print(f"unreadable records: {quarantined:,}, in {folder}/quarantine.jsonl")
    workers = f"{report.workers} worker{'s' * (report.workers != 1)}"
    if not reasons and not quarantined:
        print("nothing was removed: every document passed every stage")
    megabytes = sum(one["bytes"] for one in report.inputs) / 1e6
    print(f"{megabytes:,.1f} MB in {report.wall_seconds:.1f} s with {workers}; {folder}/report.html")


def _describe_stage(stage: "StageCount") -> str:
    """Return one row: MB/s of text per second of one core."""
    speed = stage.characters_per_second
    rate = "-" if speed is None else f"{speed / 1e6:,.1f}"
    gone = f"{stage.removed.total() + stage.quarantined:,}"
    memory = f"{stage.peak_memory / 2**20:,.0f} MiB"
    added = f"  {stage.added:,} added" if stage.added else ""
    changed = "".join(f"  {count:,} {kind}" for kind, count in stage.changes.items())
    row = f"{stage.name:<20}{stage.documents_in:>12,}{stage.kept:>12,}{gone:>10}{rate:>9}{memory:>10}"
    return f"{row}{added}{changed}"
