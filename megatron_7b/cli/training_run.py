"""A command that trains: this process becomes the only rank of the run, or starts one process per rank."""

import argparse
import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_7b.adapter import build_adapter
from megatron_7b.cli.next_commands import print_next_commands
from megatron_7b.cli.options import Parser, add_config_flag
from megatron_7b.cli.ranks import add_launch_flags, launch_plan, ranks_here
from megatron_7b.config import RunConfig, check_config
from megatron_7b.finetune import prepare_teacher
from megatron_7b.model.fitting import check_before_launch
from megatron_7b.runtime.process.launch import LaunchPlan, is_rank, launch, megatron_command
from megatron_7b.runtime.process.launched import record_stop
from megatron_7b.runtime.process.signals import EXIT_SAVED, StopReason, StopRequest, ignore_late_requests
from megatron_7b.runtime.process.terminal import restore_cursor, say
from megatron_7b.training import pretrain
from megatron_7b.training.prerequisites import check_prerequisites
from megatron_7b.training.run_folder import RunFolder
from megatron_7b.training.status import StatusWatch, stop_before_first_step
from megatron_7b.training.teacher_check import shape_of_teacher


def training_parser(command: str, summary: str) -> Parser:
    """Return the parser of a command that trains: configuration, run folder, ranks."""
    parser = Parser(command, summary, with_config=True)
    add_config_flag(parser)
    parser.add_argument("--run-dir", type=Path, required=True, help="folder of the run; resumes if it has checkpoints")
    add_launch_flags(parser)
    return parser


def with_teacher(config: RunConfig, flags: argparse.Namespace) -> RunConfig:
    """Return the configuration with the teacher as a checkpoint: one in Hugging Face's form is imported.

    Raises:
        MegatronError: It cannot be imported.
    """
    return prepare_teacher(
        config,
        flags.run_dir,
        lambda label, text: None if is_rank() else say(f"{label:<9} {text}"),
        is_preparing=not is_rank() or os.environ["RANK"] == "0",
        patience=60 * config.runtime.distributed_timeout_minutes,
    )


def train(words: Sequence[str], flags: argparse.Namespace, config: RunConfig, world_size: int) -> int:
    """Train, in this process or in one per rank.

    Args:
        words: The command and its arguments, which the ranks get as well.
        flags: Those of `training_parser`.
        config: The run, checked.
        world_size: Its ranks.

    Returns:
        0 when all steps are done, 75 when the run was saved and shall be started again.

    Raises:
        MegatronError: A mistake that the user can fix.
    """
    check_config(config, world_size=world_size)  # it may not have been known before
    ranks = ranks_here(flags, world_size)
    check_before_launch(
        config, ranks=ranks, world_size=world_size, is_training=True, adapter=build_adapter(config),
        teacher=shape_of_teacher(config),
    )  # fmt: skip
    folder = RunFolder(flags.run_dir)
    if is_rank() or world_size == 1:
        code = _train(config, folder)
    else:
        check_prerequisites(config, folder.root)
        plan = launch_plan(flags, world_size, num_threads=config.runtime.num_threads, log_folder=folder.root / "logs")
        code = _launch([*words], dataclasses.replace(plan, resumable=True), folder)
    if not is_rank() and sys.stderr.isatty():
        print_next_commands(code, ["megatron-7b", *words], folder.root, config)
    return code


def _launch(arguments: list[str], plan: LaunchPlan, folder: RunFolder) -> int:
    """Start the ranks, and have the run folder say how they ended, even if they could not."""
    status = StatusWatch(folder)
    code = launch(megatron_command(arguments), plan)
    if plan.node_rank == 0:  # which has the main rank
        status.correct(code)
    return code


def _train(config: RunConfig, folder: RunFolder) -> int:
    """Be one rank of the run. Torch is imported in here, which takes seconds: requests to stop are heard before."""

    def leave(reason: StopReason) -> None:
        is_main = os.environ.get("RANK", "0") == "0"
        message = stop_before_first_step(folder, reason, is_main=is_main)
        if is_main:
            restore_cursor(clear_line=True)
        if not record_stop(message) and is_main:
            say(message)
        os._exit(EXIT_SAVED)

    stop_request = StopRequest(config.training.exit_after_seconds, leave=leave)
    try:
        with stop_request.listening():
            return pretrain(config, folder.root, stop_request)
    finally:
        ignore_late_requests()
