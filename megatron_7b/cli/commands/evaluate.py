"""`megatron-7b evaluate`: the loss and perplexity of a checkpoint on a corpus, how it does on tasks, what it writes.

    megatron-7b evaluate --checkpoint RUN/checkpoints/latest --data P_text_document --nproc 2 --json
    megatron-7b evaluate --checkpoint RUN_A RUN_B --data P_text_document Q_text_document
    megatron-7b evaluate --checkpoint RUN/checkpoints/latest --text speeches.jsonl
    megatron-7b evaluate --checkpoint CLASSIFIER --data labelled.jsonl
    megatron-7b evaluate --checkpoint EMBEDDER --data queries.jsonl
    megatron-7b evaluate --checkpoint RUN/checkpoints/latest --tasks hellaswag,arc_easy --task-data DATA --output F.json
    megatron-7b evaluate --checkpoint RUN --task sequence_to_sequence --data F.jsonl --output predictions.jsonl
    megatron-7b evaluate --checkpoint RUN --data humaneval.jsonl --pass-at 1,10 --num-samples 20 --allow-code-execution

Every token of the corpus but the first is predicted exactly once, in windows of `data.seq_length` tokens; the figure is
the same at every layout, microbatch size and number of ranks, up to FP32 rounding. A model that was trained with
documents kept apart (`data.reset_attention_mask`) or without the prediction after their ends (`data.eod_mask_loss`) is
measured in the same way. An encoder is measured on the tokens that its training would hide, which follow from the seed.
`megatron_7b.evaluation.corpus_loss` says which tokens each window holds.
"""

import argparse
import json
import os

from megatron_7b.cli.checkpoint_command import CheckpointCommand, checkpoint_parser
from megatron_7b.cli.evaluated_labels import evaluate_on_labels, names_labels
from megatron_7b.cli.evaluated_programs import add_program_flags, evaluate_on_programs, names_problems
from megatron_7b.cli.evaluated_retrieval import evaluate_on_queries, names_queries
from megatron_7b.cli.evaluated_table import evaluate_in_table, figures_of, names_several, show_windows
from megatron_7b.cli.evaluated_texts import add_text_flags, evaluate_on_texts
from megatron_7b.cli.harness_tasks import add_task_flags, evaluate_on_tasks
from megatron_7b.cli.kept_figures import add_keep_flag, check_can_keep, keep_figures
from megatron_7b.cli.options import Parser, parse_arguments
from megatron_7b.cli.text_task import add_written_flags, evaluate_written, names_sources
from megatron_7b.errors import ConfigError
from megatron_7b.evaluation.evaluating import check_evaluation, measure_checkpoint
from megatron_7b.runtime.process.logs import configure_logging

SUMMARY = "measure a checkpoint: its loss on a corpus, or how it does on tasks"

_ROADS = ("data", "text", "tasks")
"""Options that say what is measured; each is a road of its own."""
_OF_TASKS = (
    *("task_data", "include_path", "allow_download", "num_fewshot", "limit", "apply_chat_template"),
    *("system_instruction", "gen_kwargs", "batch_size", "output", "report", "log_samples"),
)
_OF_WRITTEN_TEXTS = (
    *("task", "max_new_tokens", "num_beams", "length_penalty", "measures", "bleu_tokenizer", "rouge_tokenizer"),
    *("output", "limit", "batch_size"),
)
_OF_PROGRAMS = (
    *("pass_at", "num_samples", "allow_code_execution", "program_seconds", "temperature", "top_p", "seed"),
    *("max_new_tokens", "output", "limit", "batch_size"),
)
_OPTIONS = {
    "a corpus or records with labels": ("max_samples",),
    "--text": ("json_key", "stride", "per_document", "batch_size"),
    "--tasks": _OF_TASKS,
    "texts that a checkpoint writes": _OF_WRITTEN_TEXTS,
    "problems that are solved by programs": _OF_PROGRAMS,
}
"""What applies to each kind of measuring."""


def main(argv: list[str]) -> int:
    """Run the command; returns 0 when the loss was measured.

    Raises:
        MegatronError: Before any model is built where possible.
    """
    parser = _parser()
    command_line = parse_arguments(parser, argv)
    flags = command_line.flags
    given = [name for name in _ROADS if getattr(flags, name)]
    if len(given) != 1:
        said = f"--{' and --'.join(given)} do not go together" if given else "there is nothing to measure on"
        raise ConfigError(said, hint="--data PREFIX names a corpus, --text files of text, --tasks tasks")
    for name in ("max_samples", "limit", "batch_size"):
        value = getattr(flags, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} is {value}, expected at least 1")
    if names_several(flags):
        _refuse_others(parser, flags, "--text" if flags.text else "a corpus or records with labels")
        return evaluate_in_table(command_line, argv)
    (flags.checkpoint,) = flags.checkpoint
    flags.data = flags.data[0] if flags.data else None
    if flags.tasks:
        _refuse_others(parser, flags, "--tasks")
        return evaluate_on_tasks(command_line, argv)
    if flags.text:
        _refuse_others(parser, flags, "--text")
        return evaluate_on_texts(command_line, argv)
    if flags.task is None and names_problems(flags):
        _refuse_others(parser, flags, "problems that are solved by programs")
        return evaluate_on_programs(command_line, argv)
    command = CheckpointCommand.read(command_line) if flags.task is None else None
    if command is None or names_sources(command):
        _refuse_others(parser, flags, "texts that a checkpoint writes")
        return evaluate_written(command_line, argv)
    _refuse_others(parser, flags, "a corpus or records with labels")
    if names_labels(command):
        return evaluate_on_labels(command, argv)
    if names_queries(command):
        return evaluate_on_queries(command, argv)
    check_evaluation(command.folder, command.config, flags.data, max_samples=flags.max_samples)
    check_can_keep(flags, command.folder)
    return _evaluate(command, argv) if command.runs_here else command.launch("evaluate", argv)


def _refuse_others(parser: Parser, flags: argparse.Namespace, kind: str) -> None:
    """Refuse options that would do nothing.

    Raises:
        ConfigError: One is given that belongs to another kind of measuring.
    """
    for other, names in _OPTIONS.items():
        for name in names:
            if name not in _OPTIONS[kind] and getattr(flags, name) != parser.get_default(name):
                raise ConfigError(f"--{name.replace('_', '-')} applies to {other}, not to {kind}")


def _parser() -> Parser:
    parser = checkpoint_parser("evaluate", SUMMARY, takes_several=True)
    parser.add_argument(
        "--data",
        nargs="+",
        metavar="PREFIX",
        help="corpora: paths of .bin and .idx files, without these endings; for a head a file of records",
    )
    parser.add_argument(
        "--max-samples", type=int, metavar="K", help="only the first K windows of data.seq_length tokens; default: all"
    )
    parser.add_argument("--json", action="store_true", help="the last line of the output is one JSON object")
    add_keep_flag(parser)
    add_text_flags(parser)
    add_written_flags(parser)
    add_task_flags(parser)
    add_program_flags(parser)
    return parser


def _evaluate(command: CheckpointCommand, argv: list[str]) -> int:
    """Measure on this rank, and print on the main one."""
    flags, rank = command.command_line.flags, int(os.environ.get("RANK", "0"))
    configure_logging(rank)  # before libraries are imported that warn while they load
    (result,) = measure_checkpoint(
        command.folder,
        command.config,
        [flags.data],
        fp32_on_cpu=command.fp32_on_cpu,
        max_samples=flags.max_samples,
        on_progress=show_windows(),
    )
    if rank == 0:
        said = f"loss {result.loss:.6f} nats per token, perplexity {result.perplexity:.4f}"
        figures = figures_of(result)
        if flags.keep or not flags.json:
            print(f"{flags.data}: {said}, {result.tokens:,} tokens", flush=True)
        if flags.keep:
            keep_figures(command.folder, "corpus", {flags.data: figures}, argv, counts=("tokens",))
        if flags.json:
            print(json.dumps(figures, allow_nan=False))
    return 0
