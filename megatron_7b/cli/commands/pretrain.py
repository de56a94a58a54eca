"""`megatron-7b pretrain`: check everything, then train, in this process or in one per rank.

    megatron-7b pretrain --config tiny_cpu --run-dir R --nproc 2 --data.train P_text_document

The same command continues from the newest checkpoint of R. With `--checkpoint.initialize-from C` a fresh run starts
from C's weights and takes the shape of the model from C, whatever the preset says. Under torchrun
(`torchrun … -m megatron_7b pretrain …`) every process is a rank already and `--nproc` is left out.
"""

import dataclasses
import os
import sys
from pathlib import Path

from megatron_7b.cli.next_commands import print_next_commands
from megatron_7b.cli.options import CommandLine, Parser, add_config_flag, parse_arguments
from megatron_7b.cli.ranks import add_launch_flags, given_world_size, launch_plan, ranks_here
from megatron_7b.config import RunConfig
from megatron_7b.model.fitting import check_before_launch
from megatron_7b.runtime.process.launch import LaunchPlan, is_rank, launch, megatron_command
from megatron_7b.runtime.process.launched import record_stop
from megatron_7b.runtime.process.signals import EXIT_SAVED, StopReason, StopRequest, ignore_late_requests
from megatron_7b.runtime.process.terminal import restore_cursor, say
from megatron_7b.training import load_run_config, pretrain
from megatron_7b.training.prerequisites import check_prerequisites
from megatron_7b.training.run_folder import RunFolder
from megatron_7b.training.status import StatusWatch, stop_before_first_step

SUMMARY = "train a model from tokens, or continue a run"


def main(argv: list[str]) -> int:
    """Run the command.

    Returns:
        0 when all steps are done, 75 when the run was saved and shall be started again.

    Raises:
        ConfigError: Before torch is imported and before anything is written, with all problems in one message.
    """
    parser = Parser("pretrain", SUMMARY, with_config=True)
    add_config_flag(parser)
    parser.add_argument("--run-dir", type=Path, required=True, help="folder of the run; resumes if it has checkpoints")
    add_launch_flags(parser)
    command_line = parse_arguments(parser, argv)
    config, world_size = _checked_config(command_line)
    ranks = ranks_here(command_line.flags, world_size)
    check_before_launch(config, ranks=ranks, world_size=world_size, is_training=True)
    folder = RunFolder(command_line.flags.run_dir)
    if is_rank() or world_size == 1:
        code = _train(config, folder)
    else:
        check_prerequisites(config, folder.root)
        plan = launch_plan(
            command_line.flags, world_size, num_threads=config.runtime.num_threads, log_folder=folder.root / "logs"
        )
        code = _launch(["pretrain", *argv], dataclasses.replace(plan, resumable=True), folder)
    if not is_rank() and sys.stderr.isatty():
        print_next_commands(code, ["megatron-7b", "pretrain", *argv], folder.root, config)
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


def _checked_config(command_line: CommandLine) -> tuple[RunConfig, int]:
    """Return the configuration of the run and its number of ranks, all checks passed."""
    world_size = given_world_size(command_line.flags)
    config = load_run_config(
        command_line.flags.config, command_line.overrides, world_size=world_size, problems=command_line.problems
    )
    return config, world_size or config.parallel.model_parallel_size
