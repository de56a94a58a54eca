"""`megatron-7b evaluate --task sequence_to_sequence`: what is written for sources, compared with targets."""

import argparse
import json
import os
import sys
from pathlib import Path

from megatron_7b.cli.checkpoint_command import CheckpointCommand
from megatron_7b.cli.kept_figures import check_can_keep, keep_figures
from megatron_7b.cli.options import CommandLine, Parser
from megatron_7b.cli.progress import LineProgress
from megatron_7b.cli.tables import align
from megatron_7b.errors import ConfigError
from megatron_7b.evaluation.text_measures import BLEU_TOKENIZERS, MEASURES, ROUGE_TOKENIZERS, MeasureOptions
from megatron_7b.evaluation.written_texts import TextTask, WrittenTexts, read_text_task, run_text_task, write_texts
from megatron_7b.generation.options import GenerationOptions
from megatron_7b.generation.setup import REQUIREMENTS, read_setup
from megatron_7b.runtime.process.logs import configure_logging

_CORPUS_FILES = (".bin", ".idx")


def add_written_flags(parser: Parser) -> None:
    """Add the options of texts that are written; `--limit`, `--batch-size` and `--output` are shared with tasks."""
    texts = parser.add_argument_group("texts written for the sources of a JSONL file")
    texts.add_argument(
        "--task",
        choices=("sequence_to_sequence",),
        help="--data is a JSONL file of sources and targets, as it is for a checkpoint that has learned such; --output "
        "takes the records with what was written",
    )
    texts.add_argument("--max-new-tokens", type=int, metavar="N", help="longest text; default: as in training, or 128")
    texts.add_argument("--num-beams", type=int, metavar="N", help="beam search; default: greedy")
    texts.add_argument("--length-penalty", type=float, metavar="A", help="of a beam search")
    texts.add_argument(
        "--measures", nargs="+", choices=tuple(MEASURES), metavar="NAME", help=f"of {', '.join(MEASURES)}"
    )
    texts.add_argument("--bleu-tokenizer", choices=BLEU_TOKENIZERS, default="auto", help="sacrebleu's; auto: by script")
    texts.add_argument(
        "--rouge-tokenizer",
        choices=ROUGE_TOKENIZERS,
        default="auto",
        help="latin: rouge-score's own; unicode: words of any script, characters of Chinese; auto: by script",
    )


def names_sources(command: CheckpointCommand) -> bool:
    """Whether --data is a file, not a corpus, and the checkpoint has learned to write targets."""
    data = Path(command.command_line.flags.data)
    return (
        command.config.finetune.task == "sequence_to_sequence" and data.is_file() and data.suffix not in _CORPUS_FILES
    )


def evaluate_written(command_line: CommandLine, argv: list[str]) -> int:
    """Run the command; returns 0 when all texts are written and measured.

    Raises:
        MegatronError: Before any model is built where possible.
    """
    flags = command_line.flags
    if flags.data is None:
        raise ConfigError("--data is missing", hint="--data F.jsonl names a file of sources and targets")
    measures, generation = _measures(flags), _generation(flags)
    command = CheckpointCommand.read(command_line, REQUIREMENTS)
    configure_logging(int(os.environ.get("RANK", "0")))  # before libraries of measures are imported, which log as well
    task = read_text_task(
        read_setup(command.folder, command.config), Path(flags.data), generation=generation, measures=measures,
        output=flags.output, batch_size=flags.batch_size, limit=flags.limit,
    )  # fmt: skip
    check_can_keep(flags, command.folder)
    if not command.runs_here:
        return command.launch("evaluate", argv)
    found = run_text_task(
        task,
        fp32_on_cpu=command.fp32_on_cpu,
        warn=lambda message: print(f"warning: {message}", file=sys.stderr),
        on_progress=LineProgress("texts").update,
    )
    if found is not None:
        _tell(found, task, flags, command.folder, argv)
    return 0


def _measures(flags: argparse.Namespace) -> MeasureOptions:
    names = {} if flags.measures is None else {"names": tuple(flags.measures)}
    return MeasureOptions(bleu_tokenizer=flags.bleu_tokenizer, rouge_tokenizer=flags.rouge_tokenizer, **names)


def _generation(flags: argparse.Namespace) -> GenerationOptions:
    is_search = (flags.num_beams or 1) > 1
    return GenerationOptions(
        max_new_tokens=flags.max_new_tokens,
        temperature=None if is_search else 0.0,
        num_beams=flags.num_beams if is_search else None,
        length_penalty=flags.length_penalty,
    )


def _tell(found: WrittenTexts, task: TextTask, flags: argparse.Namespace, folder: Path, argv: list[str]) -> None:
    rows = [(one.name, f"{one.value:.2f}", one.signature) for one in found.measures]
    width = max(len(value) for _, value, _ in rows)
    print("\n".join(align([(name, value.rjust(width), signature) for name, value, signature in rows], num_left=3)))
    pace = found.num_new_tokens / max(found.seconds, 1e-9)
    print(f"{found.num_texts:,} texts, {found.num_new_tokens:,} tokens, {found.seconds:.1f} s, {pace:,.0f} tokens/s")
    if found.num_cut_sources:
        print(f"{found.num_cut_sources:,} sources were cut to fit the model")
    if found.num_unfinished:
        print(f"{found.num_unfinished:,} texts did not end by themselves: --max-new-tokens lets them be longer")
    if flags.output is not None:
        write_texts(task, found)
        print(f"what was written is in {flags.output}")
    figures = {one.name: one.value for one in found.measures}
    if flags.keep:
        keep_figures(folder, "written", {flags.data: {**figures, "texts": found.num_texts}}, argv, counts=("texts",))
    if flags.json:
        print(json.dumps({**figures, "texts": found.num_texts, "new_tokens": found.num_new_tokens}))
