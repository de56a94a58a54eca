"""`megatron-7b finetune`: prepare what users have, JSONL files and weights, then train as `pretrain` does.

    megatron-7b finetune --config sft_tiny_cpu --run-dir R --checkpoint.initialize-from HF_FOLDER --data.train F.jsonl

The model's shape is that of the weights. The same command continues the run. `--config NAME auto` has the layout chosen
for this machine (docs/planning.md).
"""

import os
from collections.abc import Mapping

from megatron_7b.adapter import build_adapter
from megatron_7b.cli.automatic import with_layout
from megatron_7b.cli.options import CommandLine, parse_arguments
from megatron_7b.cli.ranks import given_world_size, ranks_here
from megatron_7b.cli.training_run import train, training_parser, with_teacher
from megatron_7b.config import RunConfig, check_config, load_config
from megatron_7b.finetune import check_asked, prepare_finetuning
from megatron_7b.model.fitting import check_before_launch
from megatron_7b.planning import AUTO
from megatron_7b.runtime.process.launch import is_rank
from megatron_7b.runtime.process.terminal import say

SUMMARY = "fine-tune a model on your own data, or continue such a run"


def main(argv: list[str]) -> int:
    """Run the command.

    Returns:
        0 when all steps are done, 75 when the run was saved and shall be started again.

    Raises:
        MegatronError: Before anything is trained: a mistake that the user can fix.
    """
    command_line = parse_arguments(training_parser("finetune", SUMMARY), argv)
    if AUTO in command_line.flags.config:
        names = [name for name in command_line.flags.config if name != AUTO]
        check_asked(load_config(names, command_line.overrides, problems=command_line.problems))
        command_line, argv = with_layout(command_line, argv)
    config, world_size = _checked_config(command_line)
    return train(["finetune", *argv], command_line.flags, config, world_size)


def _checked_config(command_line: CommandLine) -> tuple[RunConfig, int]:
    """Return the configuration of the run and its number of ranks, everything prepared and all checks passed."""
    world_size = given_world_size(command_line.flags)
    asked = load_config(
        command_line.flags.config,
        _with_steps_as_asked(command_line.overrides),
        world_size=world_size,
        problems=command_line.problems,
    )

    def check_memory(known: RunConfig) -> None:
        size = world_size or known.parallel.model_parallel_size
        ranks = ranks_here(command_line.flags, size)
        check_before_launch(known, ranks=ranks, world_size=size, is_training=True, adapter=build_adapter(known))

    config = prepare_finetuning(
        asked,
        command_line.flags.run_dir,
        lambda label, text: None if is_rank() else say(f"{label:<9} {text}"),
        model_options={path: value for path, value in command_line.overrides.items() if path.startswith("model.")},
        world_size=world_size,
        check=check_memory,
        is_preparing=not is_rank() or os.environ["RANK"] == "0",
        patience=60 * asked.runtime.distributed_timeout_minutes,
    )
    check_config(config, world_size=world_size, require_data=True)
    config = with_teacher(config, command_line.flags)
    return config, world_size or config.parallel.model_parallel_size


def _with_steps_as_asked(overrides: Mapping[str, object]) -> dict[str, object]:
    """Return options in which steps that the command line asks for go before the epochs of a preset."""
    if "training.train_steps" in overrides and "finetune.epochs" not in overrides:
        return {**overrides, "finetune.epochs": None}
    return dict(overrides)
