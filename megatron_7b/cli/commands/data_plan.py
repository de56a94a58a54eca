"""`megatron-7b data plan`: what a run will take from each of its sets, before it is started.

megatron-7b data plan --config llama3_8b --data.train 0.7 web_text_document 0.3 code_text_document --nproc 64

With `--run-dir` it is what the rest of a run will take, and whether the settings continue what was read; the settings
are those of the run where no `--config` is given.
"""

import json
from bisect import bisect_left
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_7b.cli.options import CommandLine, Parser, add_config_flag, parse_arguments
from megatron_7b.config import RunConfig, TrainingConfig, check_config, load_config
from megatron_7b.errors import ConfigError

if TYPE_CHECKING:
    from megatron_7b.data import Dataset
    from megatron_7b.training.progress import Progress

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
    plan = _make_plan(command_line)
    print(json.dumps(plan, ensure_ascii=False) if command_line.flags.json else _as_table(plan))
    return 0


class StepClock:
    """At which step a sample is taken: constant batches, or those of the ramp-up."""

    def __init__(self, training: TrainingConfig, *, step: int = 0, consumed: int = 0) -> None:
        """Count on from where a run is.

        Args:
            training: Batch sizes and number of steps.
            step: Steps that are done.
            consumed: Samples that they took.
        """
        from megatron_7b.training.batch_schedule import consumed_samples_after, global_batch_size

        self._full = training.global_batch_size
        self._step = step
        self.num_samples = consumed_samples_after(training.train_steps - step, training, consumed=consumed)
        self._consumed = [consumed]
        """Samples after each step of the ramp-up."""
        while len(self._consumed) <= training.train_steps - step:
            size = global_batch_size(self._consumed[-1], training)
            if size == self._full:
                break
            self._consumed.append(self._consumed[-1] + size)

    def step_of(self, num_samples: int) -> int:
        """The step, counted from 1, that takes sample number `num_samples` of the run, counted from 1 too.

        For samples that are consumed it is the last step that is done.
        """
        beyond = num_samples - self._consumed[-1]
        if beyond <= 0:
            return self._step + bisect_left(self._consumed, num_samples)
        return self._step + len(self._consumed) - 1 + -(-beyond // self._full)


def _make_plan(command_line: CommandLine) -> dict[str, object]:
    from megatron_7b.data.samples.corpus_tokenizer import check_agreement
    from megatron_7b.data.samples.plan import plan_sets
    from megatron_7b.training.progress import Progress, read_progress

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
    check_agreement(config.data)
    progress = read_progress(flags.run_dir / "checkpoints", config) if flags.run_dir else Progress()
    done = progress.counters
    clock = StepClock(config.training, step=done.step, consumed=done.consumed_samples)
    dataset, validation = _open(config, progress)
    rows = []
    for row in plan_sets(dataset, clock.num_samples):
        steps = {
            f"{name}_at_step": None if number is None else clock.step_of(number)
            for name, number in (("first_epoch_ends", row.first_epoch_ends), ("runs_out", row.runs_out))
        }
        rows.append({**asdict(row), **steps})
    return {
        "train_steps": config.training.train_steps,
        "steps_done": done.step,
        "samples": clock.num_samples,
        "consumed_samples": done.consumed_samples,
        "seq_length": config.data.seq_length,
        "tokens": done.consumed_tokens + progress.tokens_left(config),
        "notes": list(dataset.notes),
        "sets": rows,
        "validation": validation,
    }


def _config_of(run_dir: Path | None) -> list[str]:
    """The configuration of a run, where no other is given."""
    config = run_dir / "config.yaml" if run_dir is not None else None
    return [str(config)] if config is not None and config.is_file() else []


def _open(config: RunConfig, progress: "Progress") -> "tuple[Dataset, dict[str, object] | None]":
    """The training samples, and what validation reads; None where there is none."""
    from megatron_7b.data import has_split
    from megatron_7b.data.upkeep.quick_check import check_corpora, find_prefixes, refuse_damaged
    from megatron_7b.objective import build_objective

    checked = check_corpora(find_prefixes(config.data), full=config.data.verify == "full")
    refuse_damaged(checked)
    objective = build_objective(config)
    contents = {one.prefix: one.content for one in checked}
    train = objective.open_windows(config, "train", contents=contents, reached=progress.reached)
    if not has_split(config.data, "valid"):
        return train, None
    valid = objective.open_windows(config, "valid")
    rows = [
        {"prefix": part.prefix, "documents": part.end_document - part.first_document, "tokens": part.num_tokens}
        for part in valid.parts
    ]
    return train, {"samples_per_epoch": valid.num_samples, "sets": rows, "left_out": list(valid.left_out)}


def _as_table(plan: dict[str, object]) -> str:
    sets = _as_list(plan["sets"])
    samples = f"{plan['samples']:,} samples of {plan['seq_length']:,}"
    lines = [f"{plan['train_steps']:,} steps, {samples}, {plan['tokens']:,} tokens"]
    if plan["steps_done"]:
        lines[0] += f"; done: {plan['steps_done']:,} steps, {plan['consumed_samples']:,} samples"
    lines += _as_list(plan["notes"])
    titles = ["set", "tokens", "share", "samples", "epochs", "first epoch ends"]
    rows = [titles]
    is_bounded = any(row["max_samples"] is not None for row in sets)
    if is_bounded:
        titles.append("runs out")
    for row in sets:
        cells = [
            row["prefix"],
            f"{row['tokens']:,}",
            f"{row['share']:.4%}",
            f"{row['samples']:,}",
            f"{row['epochs']:,.3f}",
            _at_step(row["first_epoch_ends_at_step"]),
        ]
        if is_bounded:
            cells.append("never" if row["max_samples"] is None else _at_step(row["runs_out_at_step"]))
        rows.append(cells)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(cells))
    lines.append(_describe_validation(plan["validation"]))
    return "\n".join(lines)


def _as_list(value: object) -> list[Any]:
    assert isinstance(value, list)
    return value


def _describe_validation(validation: object) -> str:
    if not isinstance(validation, dict):
        return "no validation: no set has enough documents for one sample"
    sets, left_out = validation["sets"], validation["left_out"]
    tokens = sum(row["tokens"] for row in sets)
    line = f"validation: {len(sets)} of {len(sets) + len(left_out)} sets, {tokens:,} tokens"
    return line + (f"; too small for one sample: {', '.join(left_out)}" if left_out else "")


def _at_step(step: int | None) -> str:
    return "not in this run" if step is None else f"at step {step:,}"
