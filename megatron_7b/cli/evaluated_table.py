"""`megatron-7b evaluate` of several checkpoints, corpora or texts: one table, one model in memory at a time."""

import argparse
import contextlib
import gc
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from megatron_7b.cli.bad_records import print_bad_records
from megatron_7b.cli.checkpoint_command import CheckpointCommand
from megatron_7b.cli.evaluated_texts import TEXT_HEADS, keep_texts, measure_texts_of, text_cells
from megatron_7b.cli.kept_figures import check_can_keep, keep_figures
from megatron_7b.cli.options import CommandLine
from megatron_7b.cli.progress import LineProgress
from megatron_7b.cli.tables import align
from megatron_7b.data.reading.records import BadRecord
from megatron_7b.data.reading.sources import find_sources
from megatron_7b.errors import ConfigError, MegatronError
from megatron_7b.evaluation import CorpusLoss, EvaluationProgress
from megatron_7b.evaluation.evaluating import check_evaluation, measure_checkpoint
from megatron_7b.generation.setup import REQUIREMENTS, GenerationSetup, read_setup
from megatron_7b.runtime.process.logs import configure_logging

type Json = dict[str, object]

_CORPUS_HEADS = ["corpus", "tokens", "loss", "perplexity"]


def names_several(flags: argparse.Namespace) -> bool:
    """Whether a command names several checkpoints or corpora.

    Raises:
        ConfigError: It does, for a kind of measuring that takes one.
    """
    checkpoints, data = flags.checkpoint, flags.data or ()
    if len(checkpoints) == 1 and len(data) <= 1:
        return False
    if flags.tasks or flags.task or flags.pass_at:
        several = f"{len(checkpoints)} checkpoints" if len(checkpoints) > 1 else f"{len(data)} --data"
        raise ConfigError(
            f"{several} are named, of which tasks take one",
            hint="measure one after another with --output, then compare two: `megatron-7b compare A.json B.json`",
        )
    return True


def evaluate_in_table(command_line: CommandLine, argv: list[str]) -> int:
    """Run the command; returns 0 when every checkpoint was measured on everything.

    Raises:
        MegatronError: It names the checkpoint. All are checked before the first one is measured; if one fails
            later, what was measured before it has been printed.
    """
    flags = command_line.flags
    for what, named in (("checkpoint", [str(one) for one in flags.checkpoint]), ("data", flags.data or [])):
        twice = [one for one in named if named.count(one) > 1]
        if twice:
            raise ConfigError(f"--{what} names {twice[0]} twice")
    return _texts_in_table(command_line, argv) if flags.text else _corpora_in_table(command_line, argv)


def _corpora_in_table(command_line: CommandLine, argv: list[str]) -> int:
    flags = command_line.flags
    for corpus in flags.data:
        if Path(corpus).is_file():
            raise ConfigError(
                f"{corpus} is a file, but several checkpoints or --data are measured together on corpora only",
                hint="name what its .bin and .idx share; measure a head, an embedder or programs one after another",
            )
    commands = []
    for checkpoint in flags.checkpoint:
        with _named(checkpoint):
            command = CheckpointCommand.read(command_line, checkpoint=checkpoint)
            for corpus in flags.data:
                check_evaluation(command.folder, command.config, corpus, max_samples=flags.max_samples)
            check_can_keep(flags, command.folder)
        commands.append(command)
    if not commands[0].runs_here:
        return commands[0].launch("evaluate", argv)
    with _table(_CORPUS_HEADS, as_json=flags.json) as table:
        for checkpoint, command in zip(flags.checkpoint, commands, strict=True):
            with _named(checkpoint):
                results = measure_checkpoint(
                    command.folder,
                    command.config,
                    flags.data,
                    fp32_on_cpu=command.fp32_on_cpu,
                    max_samples=flags.max_samples,
                    on_progress=show_windows(),
                )
            found = dict(zip(flags.data, map(figures_of, results), strict=True))
            for corpus, figures in found.items():
                table.add(checkpoint, {"data": corpus, **figures}, [corpus, *_corpus_cells(figures)])
            if flags.keep:
                keep_figures(command.folder, "corpus", found, argv, counts=("tokens",))
        table.notes += _different_contexts(commands)
    return 0


def _texts_in_table(command_line: CommandLine, argv: list[str]) -> int:
    flags = command_line.flags
    if flags.per_document is not None:
        raise ConfigError("--per-document takes the texts of one checkpoint", hint="leave it out, or name one only")
    find_sources(flags.text)
    opened: list[tuple[CheckpointCommand, GenerationSetup]] = []
    for checkpoint in flags.checkpoint:
        with _named(checkpoint):
            command = CheckpointCommand.read(command_line, REQUIREMENTS, checkpoint)
            setup = read_setup(command.folder, command.config)
            setup.check_scores()
            check_can_keep(flags, command.folder)
            opened.append((command, setup))
    if not opened[0][0].runs_here:
        return opened[0][0].launch("evaluate", argv)
    with _table(TEXT_HEADS, as_json=flags.json) as table:
        for checkpoint, (command, setup) in zip(flags.checkpoint, opened, strict=True):
            with _named(checkpoint):
                found = measure_texts_of(command, setup)
            if found is not None:  # the main rank
                for name, one in found.rows().items():
                    table.add(checkpoint, {"file": name, **one.to_dict()}, text_cells(name, one))
                table.bad = found.bad  # the same records for every checkpoint
                if flags.keep:
                    keep_texts(found, command.folder, argv)
    return 0


class _Table:
    """Rows as they are found; every checkpoint's model is gone before the next one is built."""

    def __init__(self) -> None:
        self.cells: list[list[str]] = []
        self.rows: list[Json] = []
        self.notes: list[str] = []
        self.bad: Sequence[BadRecord] = ()

    def add(self, checkpoint: Path, figures: Json, cells: list[str]) -> None:
        """Take a row: its figures for JSON, its cells after the checkpoint's name for people."""
        self.rows.append({"checkpoint": str(checkpoint), **figures})
        self.cells.append([str(checkpoint), *cells])
        gc.collect()


@contextlib.contextmanager
def _table(heads: list[str], *, as_json: bool) -> Iterator[_Table]:
    """Print on the main rank what a with block adds, also when it fails after some rows."""
    rank, table = int(os.environ.get("RANK", "0")), _Table()
    configure_logging(rank)  # before libraries are imported that warn while they load
    try:
        yield table
    finally:
        if rank == 0 and table.rows:
            print("\n".join([*align([["checkpoint", *heads], *table.cells], num_left=2), *table.notes]))
            print_bad_records(table.bad)
            if as_json:
                print(json.dumps({"results": table.rows}, allow_nan=False))


@contextlib.contextmanager
def _named(checkpoint: Path) -> Iterator[None]:
    """Have the errors of a with block say which checkpoint they are about."""
    try:
        yield
    except MegatronError as error:
        said = str(error.args[0])
        if str(checkpoint) not in said:
            raise type(error)(f"{checkpoint}: {said}", hint=error.hint) from error
        raise


def show_windows() -> Callable[[EvaluationProgress], None]:
    """Return what shows how far an evaluation on a corpus is."""
    line = LineProgress("windows")

    def show(progress: EvaluationProgress) -> None:
        so_far = progress.so_far
        pace = f"{so_far.tokens / line.seconds:,.0f} tokens/s"
        line.update(progress.windows, progress.total_windows, f"loss {so_far.loss:.4f}", pace)

    return show


def figures_of(result: CorpusLoss) -> dict[str, float | int | None]:
    """Return the figures as JSON has them, which knows no NaN and no infinity."""
    values = {"loss": result.loss, "perplexity": result.perplexity, "tokens": result.tokens}
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def _corpus_cells(figures: dict[str, float | int | None]) -> list[str]:
    forms = (("tokens", ",d"), ("loss", ".6f"), ("perplexity", ".4f"))
    return ["-" if (value := figures[name]) is None else format(value, form) for name, form in forms]


def _different_contexts(commands: Sequence[CheckpointCommand]) -> list[str]:
    """Say that losses cannot be compared as they are, where windows have different lengths."""
    lengths = sorted({command.config.data.seq_length for command in commands})
    if len(lengths) == 1:
        return []
    said = " and ".join(f"{one:,}" for one in lengths)
    return [
        (
            f"the windows of these checkpoints have {said} tokens, and a longer context makes prediction easier: "
            f"--data.seq-length {lengths[0]} gives all of them the same"
        )
    ]
