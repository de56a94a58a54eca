"""`megatron-7b evaluate` of a checkpoint that makes vectors: how well the queries of a file find their texts."""

import json
import os
from pathlib import Path

from megatron_7b.cli.checkpoint_command import CheckpointCommand
from megatron_7b.cli.kept_figures import check_can_keep, keep_figures
from megatron_7b.cli.tables import align
from megatron_7b.evaluation.retrieval import check_retrieval, measure_retrieval
from megatron_7b.runtime.process.logs import configure_logging


def names_queries(command: CheckpointCommand) -> bool:
    """Return whether a command asks how well queries find their texts."""
    file = Path(command.command_line.flags.data)
    return command.config.objective_name == "embedding" and file.is_file() and file.suffix not in (".bin", ".idx")


def evaluate_on_queries(command: CheckpointCommand, argv: list[str]) -> int:
    """Run the command; returns 0 when all queries were ranked.

    Raises:
        MegatronError: Before any model is built where possible.
    """
    flags = command.command_line.flags
    queries = check_retrieval(command.folder, command.config, Path(flags.data))[: flags.max_samples]
    check_can_keep(flags, command.folder)
    if not command.runs_here:
        return command.launch("evaluate", argv)
    rank = int(os.environ.get("RANK", "0"))
    configure_logging(rank)
    found = measure_retrieval(command.folder, command.config, queries, fp32_on_cpu=command.fp32_on_cpu).to_dict()
    if rank == 0:
        print("\n".join(align([list(found), [_short(value) for value in found.values()]], num_left=0)), flush=True)
        if flags.keep:
            keep_figures(command.folder, "retrieval", {flags.data: found}, argv, counts=("queries", "documents"))
        if flags.json:
            print(json.dumps(found))
    return 0


def _short(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
