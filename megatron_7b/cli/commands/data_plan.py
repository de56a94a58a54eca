"""`megatron-7b data plan`: what a run will take from each of its sets, before it is started.

megatron-7b data plan --config llama3_8b --data.train 0.7 web_text_document 0.3 code_text_document --nproc 64

With `--run-dir` it is what the rest of a run will take, and whether the settings continue what was read; without
`--config` the settings are those of the run.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_7b.cli.options import CommandLine, Parser, add_config_flag, parse_arguments
from megatron_7b.cli.tables import align
from megatron_7b.config import RunConfig, check_config, load_config
from megatron_7b.errors import ConfigError

if TYPE_CHECKING:
    from megatron_7b.training.run_plan import PlannedSet, RunPlan, ValidationPlan

SUMMARY = "print what a run will take from each set: tokens, share, samples, epochs, and when the first epoch ends"


def main(argv: list[str]) -> int:
    """Run the command.

    Raises:
        ConfigError: The configuration is impossible, with all problems in one message.
        DataFormatError: A corpus is damaged, or smaller than one sample.
    """
    parser = Parser("data plan", SUMMARY, with_config=True)
    add_config_flag(parser)
    parser.add_argument("--nproc", type=int, help="also check that this many ranks fit")
    parser.add_argument("--run-dir", type=Path, help="plan the rest of this run, from its newest checkpoint on")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    command_line = parse_arguments(parser, argv)
    config = _read_config(command_line)
    from megatron_7b.training.run_plan import plan_run

    plan = plan_run(config, command_line.flags.run_dir)
    print(json.dumps(asdict(plan), ensure_ascii=False) if command_line.flags.json else _as_table(plan))
    return 0


def _read_config(command_line: CommandLine) -> RunConfig:
    flags = command_line.flags
    if flags.nproc is not None and flags.nproc < 1:
        raise ConfigError(f"--nproc {flags.nproc} must be at least 1")
    config = load_config(
        flags.config or _config_of(flags.run_dir),
        command_line.overrides,
        world_size=flags.nproc,
        require_data=True,
        problems=command_line.problems,
    )
    check_config(config, world_size=flags.nproc, require_data=True)
    return config


def _config_of(run_dir: Path | None) -> list[str]:
    """Return the configuration of a run, for a command line that names none."""
    config = run_dir / "config.yaml" if run_dir is not None else None
    return [str(config)] if config is not None and config.is_file() else []


def _as_table(plan: "RunPlan") -> str:
    samples = f"{plan.samples:,} samples of {plan.seq_length:,}"
    first = f"{plan.train_steps:,} steps, {samples}, {plan.tokens:,} tokens"
    if plan.steps_done:
        first += f"; done: {plan.steps_done:,} steps, {plan.consumed_samples:,} samples"
    rows = _rows(plan.sets)
    return "\n".join([first, *plan.notes, *align(rows, num_left=1), _describe_validation(plan.validation)])


def _rows(sets: "Sequence[PlannedSet]") -> list[list[str]]:
    rows = [["set", "tokens", "share", "samples", "epochs", "first epoch ends"]]
    rows += [
        [
            one.prefix,
            f"{one.tokens:,}",
            f"{one.share:.4%}",
            f"{one.samples:,}",
            f"{one.epochs:,.3f}",
            _at_step(one.first_epoch_ends_at_step),
        ]
        for one in sets
    ]
    if any(one.max_samples is not None for one in sets):
        ends = ["never" if one.max_samples is None else _at_step(one.runs_out_at_step) for one in sets]
        rows = [[*row, end] for row, end in zip(rows, ["runs out", *ends], strict=True)]
    return rows


def _describe_validation(validation: "ValidationPlan | None") -> str:
    if validation is None:
        return "no validation: no set has enough documents for one sample"
    tokens = sum(one.tokens for one in validation.sets)
    num_sets, left_out = len(validation.sets), validation.left_out
    line = f"validation: {num_sets} of {num_sets + len(left_out)} sets, {tokens:,} tokens"
    return line + (f"; too small for one sample: {', '.join(left_out)}" if left_out else "")


def _at_step(step: int | None) -> str:
    return "not in this run" if step is None else f"at step {step:,}"
