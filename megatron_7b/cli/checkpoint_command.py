"""What `evaluate` and `generate` share: a checkpoint at any layout, in this process or on several ranks."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_7b.adapter import build_adapter
from megatron_7b.checkpoint import resolve_checkpoint
from megatron_7b.checkpoint.inference_config import inference_config
from megatron_7b.cli.options import CommandLine, Parser
from megatron_7b.cli.ranks import add_launch_flags, given_world_size, launch_plan, ranks_here
from megatron_7b.config import RunConfig
from megatron_7b.model.fitting import check_before_launch
from megatron_7b.parallel import ParallelLayout, build_layout
from megatron_7b.runtime.process.launch import is_rank, launch, megatron_command


def checkpoint_parser(command: str, summary: str, *, takes_several: bool = False) -> Parser:
    """Return a parser that takes `--checkpoint`, the flags of ranks, and the options of the configuration.

    Args:
        command: Its name.
        summary: What it does.
        takes_several: Whether `--checkpoint` may name several; the flag is a list then.
    """
    parser = Parser(command, summary, with_config=True)
    what = "step folder, RUN/checkpoints/latest, or a run folder"
    if takes_several:
        parser.add_argument("--checkpoint", type=Path, nargs="+", required=True, metavar="C", help=what)
    else:
        parser.add_argument("--checkpoint", type=Path, required=True, help=what)
    add_launch_flags(parser)
    return parser


@dataclass(frozen=True)
class CheckpointCommand:
    """A checkpoint, and how a command line wants it computed with."""

    command_line: CommandLine
    folder: Path
    config: RunConfig
    world_size: int

    @classmethod
    def read(
        cls,
        command_line: CommandLine,
        requirements: Mapping[str, object] | None = None,
        checkpoint: Path | None = None,
    ) -> "CheckpointCommand":
        """Find the checkpoint and check its configuration.

        Args:
            command_line: What was asked for.
            requirements: Those of `inference_config`.
            checkpoint: Which one; None: the one that `--checkpoint` names.

        Raises:
            CheckpointError: There is no complete checkpoint.
            ConfigError: An option is unknown or impossible, or the number of ranks does not fit the layout.
        """
        folder = resolve_checkpoint(checkpoint or command_line.flags.checkpoint)
        config = inference_config(
            folder, command_line.overrides, requirements=requirements, problems=command_line.problems
        )
        world_size = given_world_size(command_line.flags) or config.parallel.model_parallel_size
        build_layout(config.parallel, world_size=world_size, rank=0)  # refuses a number of ranks that does not fit
        command = cls(command_line, folder, config, world_size)
        command.check_memory()
        return command

    def check_memory(self) -> None:
        """Refuse a model that cannot fit into this machine's memory.

        Raises:
            ConfigError: It cannot.
        """
        config = self.config
        if self.fp32_on_cpu:
            config = dataclasses.replace(config, precision=dataclasses.replace(config.precision, params_dtype="fp32"))
        ranks = ranks_here(self.command_line.flags, self.world_size)
        check_before_launch(
            config, ranks=ranks, world_size=self.world_size, is_training=False, adapter=build_adapter(config)
        )

    @property
    def layout(self) -> ParallelLayout:
        """The layout, as the first rank sees it."""
        return build_layout(self.config.parallel, world_size=self.world_size, rank=0)

    @property
    def fp32_on_cpu(self) -> bool:
        """Whether to compute in FP32 on a CPU: unless the command line names a number format."""
        return "precision.params_dtype" not in self.command_line.overrides

    @property
    def runs_here(self) -> bool:
        """Whether this process is a rank; otherwise `launch` starts them."""
        return is_rank() or self.world_size == 1

    def launch(self, command: str, argv: list[str]) -> int:
        """Run the command as every rank, and return its exit code."""
        plan = launch_plan(self.command_line.flags, self.world_size, num_threads=self.config.runtime.num_threads)
        return launch(megatron_command([command, *argv]), plan)
