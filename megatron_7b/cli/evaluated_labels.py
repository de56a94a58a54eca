"""`megatron-7b evaluate` of a checkpoint with a head: predictions for labelled records against their labels."""

import json
import math
import os
from pathlib import Path

from megatron_7b.cli.checkpoint_command import CheckpointCommand
from megatron_7b.cli.kept_figures import check_can_keep, keep_figures
from megatron_7b.evaluation.labelled.measuring import measure_labels, read_labelled
from megatron_7b.prediction.predicting import prediction_setup
from megatron_7b.runtime.process.logs import configure_logging


def names_labels(command: CheckpointCommand) -> bool:
    """Return whether a command asks for the measures of a head on a file of records."""
    file = Path(command.command_line.flags.data)
    return command.config.model.has_head and file.is_file() and file.suffix not in (".bin", ".idx")


def evaluate_on_labels(command: CheckpointCommand, argv: list[str]) -> int:
    """Run the command; returns 0 when all records have their prediction.

    Raises:
        MegatronError: Before any model is built where possible.
    """
    flags = command.command_line.flags
    setup = prediction_setup(command.folder, command.config)
    records = read_labelled(setup, Path(flags.data))[: flags.max_samples]
    check_can_keep(flags, command.folder)
    if not command.runs_here:
        return command.launch("evaluate", argv)
    rank = int(os.environ.get("RANK", "0"))
    configure_logging(rank)
    found = measure_labels(setup, records, fp32_on_cpu=command.fp32_on_cpu)
    if rank:
        return 0
    figures = ", ".join(f"{name} {value:.4f}" for name, value in found.values.items())
    print(f"{found.report}\n{flags.data}: {figures}, {found.count:,} records".lstrip("\n"), flush=True)
    if flags.keep:
        keep_figures(
            command.folder, "labels", {flags.data: {**found.values, "records": found.count}}, argv, counts=("records",)
        )
    if flags.json:
        finite = {name: value if math.isfinite(value) else None for name, value in found.values.items()}
        print(json.dumps({**finite, "records": found.count}))
    return 0
