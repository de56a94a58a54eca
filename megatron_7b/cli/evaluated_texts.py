"""`megatron-7b evaluate --text`: how well a checkpoint predicts the texts of files."""

import argparse
import json
import os
from pathlib import Path

from megatron_7b.cli.bad_records import print_bad_records
from megatron_7b.cli.checkpoint_command import CheckpointCommand
from megatron_7b.cli.kept_figures import check_can_keep, keep_figures
from megatron_7b.cli.options import CommandLine, Parser
from megatron_7b.cli.progress import open_progress
from megatron_7b.cli.tables import align
from megatron_7b.data.reading.progress import tell_nobody
from megatron_7b.data.reading.sources import find_sources
from megatron_7b.evaluation.texts import TextLoss, TextLosses, measure_texts
from megatron_7b.generation.setup import REQUIREMENTS, GenerationSetup, read_setup
from megatron_7b.runtime.output_paths import check_file_to_write
from megatron_7b.runtime.process.logs import configure_logging

TEXT_HEADS = ["file", "documents", "tokens", "loss", "perplexity", "bits per byte", "word perplexity"]


def add_text_flags(parser: Parser) -> None:
    """Add the options that texts have."""
    texts = parser.add_argument_group("texts")
    texts.add_argument(
        "--text", nargs="+", metavar="F", help="files, globs or folders as `preprocess` reads; instead of --data"
    )
    texts.add_argument("--json-key", default="text", metavar="KEY", help="which key of a record holds the text")
    texts.add_argument(
        "--stride", type=int, metavar="N", help="tokens that a window of a long text moves on by; default: all that fit"
    )
    texts.add_argument("--per-document", type=Path, metavar="FILE", help="JSONL file that gets a line for each text")


def evaluate_on_texts(command_line: CommandLine, argv: list[str]) -> int:
    """Run the command; returns 0 when all texts were read.

    Raises:
        MegatronError: Before any model is built where possible.
    """
    flags = command_line.flags
    command = CheckpointCommand.read(command_line, REQUIREMENTS)
    find_sources(flags.text)
    if flags.per_document is not None:
        check_file_to_write(flags.per_document, "--per-document")
    check_can_keep(flags, command.folder)
    setup = read_setup(command.folder, command.config)
    setup.check_scores()
    if not command.runs_here:
        return command.launch("evaluate", argv)
    configure_logging(int(os.environ.get("RANK", "0")))
    found = measure_texts_of(command, setup)
    if found is not None:
        _tell(found, flags, command.folder, argv)
    return 0


def measure_texts_of(command: CheckpointCommand, setup: GenerationSetup) -> TextLosses | None:
    """Measure a checkpoint on the texts that a command names; returns the figures on the main rank."""
    flags, is_main = command.command_line.flags, os.environ.get("RANK", "0") == "0"
    return measure_texts(
        setup,
        flags.text,
        key=flags.json_key,
        stride=flags.stride,
        per_document=flags.per_document is not None,
        batch_size=flags.batch_size,
        fp32_on_cpu=command.fp32_on_cpu,
        open_progress=open_progress if is_main else tell_nobody,
    )


def keep_texts(found: TextLosses, folder: Path, argv: list[str]) -> None:
    """Keep the figures of each file in a checkpoint."""
    figures = {name: one.to_dict() for name, one in found.by_file.items()}
    keep_figures(folder, "texts", figures, argv, counts=("nats", "documents", "tokens", "words", "bytes"))


def _tell(found: TextLosses, flags: argparse.Namespace, folder: Path, argv: list[str]) -> None:
    print("\n".join(align([TEXT_HEADS, *(text_cells(name, one) for name, one in found.rows().items())], num_left=1)))
    print_bad_records(found.bad)
    try:
        if flags.per_document is not None:
            found.write_documents(flags.per_document)
        if flags.keep:
            keep_texts(found, folder, argv)
    finally:  # a full disk costs none of the figures
        if flags.json:
            files = {name: one.to_dict() for name, one in found.by_file.items()}
            print(json.dumps({**found.total.to_dict(), "files": files}))


def text_cells(name: str, one: TextLoss) -> list[str]:
    """Return what a table says of some texts, below `TEXT_HEADS`."""
    counts = [f"{one.documents:,}", f"{one.tokens:,}"]
    return [
        name,
        *counts,
        f"{one.loss:.4f}",
        f"{one.perplexity:.2f}",
        f"{one.bits_per_byte:.4f}",
        f"{one.word_perplexity:.2f}",
    ]
