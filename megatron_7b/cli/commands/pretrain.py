"""`megatron-7b pretrain`: check everything, then train, in this process or in one per rank.

    megatron-7b pretrain --config tiny_cpu --run-dir R --nproc 2 --data.train P_text_document

The same command continues from the newest checkpoint of R. With `--checkpoint.initialize-from C` a fresh run starts
from C's weights and takes the shape of the model from C, whatever the preset says. Under torchrun
(`torchrun … -m megatron_7b pretrain …`) every process is a rank already and `--nproc` is left out. `--config NAME auto`
has the layout chosen for this machine (docs/planning.md).
"""

from megatron_7b.cli.automatic import with_layout
from megatron_7b.cli.options import CommandLine, parse_arguments
from megatron_7b.cli.ranks import given_world_size
from megatron_7b.cli.training_run import train, training_parser, with_teacher
from megatron_7b.config import RunConfig
from megatron_7b.training import load_run_config

SUMMARY = "train a model from tokens, or continue a run"


def main(argv: list[str]) -> int:
    """Run the command.

    Returns:
        0 when all steps are done, 75 when the run was saved and shall be started again.

    Raises:
        ConfigError: Before torch is imported and before anything is written, with all problems in one message.
    """
    command_line, argv = with_layout(parse_arguments(training_parser("pretrain", SUMMARY), argv), argv)
    config, world_size = _checked_config(command_line)
    return train(["pretrain", *argv], command_line.flags, config, world_size)


def _checked_config(command_line: CommandLine) -> tuple[RunConfig, int]:
    """Return the configuration of the run and its number of ranks, all checks passed."""
    world_size = given_world_size(command_line.flags)
    config = load_run_config(
        command_line.flags.config, command_line.overrides, world_size=world_size, problems=command_line.problems
    )
    config = with_teacher(config, command_line.flags)
    return config, world_size or config.parallel.model_parallel_size
