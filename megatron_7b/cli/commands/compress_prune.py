"""`megatron-7b compress prune`: a smaller model of what text shows to matter most in a larger one.

megatron-7b compress prune --checkpoint C --output C2 --calibration F.jsonl --num-layers 24
megatron-7b compress prune --checkpoint C --output C2 --calibration F.jsonl --hidden-size 512 --ffn-hidden-size 1280
megatron-7b compress prune --checkpoint C --output C2 --calibration F.jsonl --num-layers 24 --nproc 2 \
        --parallel.tensor-model-parallel-size 2
"""

import argparse
import json
import os
import sys
from pathlib import Path

from megatron_7b.checkpoint import read_config, resolve_checkpoint
from megatron_7b.cli.checkpoint_command import CheckpointCommand, checkpoint_parser
from megatron_7b.cli.options import Parser, parse_arguments
from megatron_7b.cli.progress import LineProgress
from megatron_7b.cli.tables import align
from megatron_7b.compression.pruning import (
    CalibrationText,
    PrunedCheckpoint,
    PruneOptions,
    check_pruning,
    prune_checkpoint,
)
from megatron_7b.compression.pruning.page import write_page
from megatron_7b.compression.pruning.plan import DEPTH_SCORES
from megatron_7b.compression.pruning.scores import perplexity
from megatron_7b.compression.pruning.sparse_checkpoint import SparseOptions, check_sparsity, sparsify_checkpoint
from megatron_7b.errors import ConfigError
from megatron_7b.runtime.output_paths import check_file_to_write
from megatron_7b.runtime.process.logs import configure_logging

_SEQ_LENGTH = 512

SUMMARY = "remove the layers, heads, neurons and channels that text shows to matter least"


def main(argv: list[str]) -> int:
    """Run the command; returns 0 when the smaller model is published and measured.

    Raises:
        MegatronError: Before any model is built where possible.
    """
    command_line = parse_arguments(_parser(), argv)
    flags = command_line.flags
    flags.seq_length = _seq_length(flags)
    _check_numbers(flags)
    calibration, options = _calibration(flags), _options(flags)
    if flags.report is not None:
        check_file_to_write(flags.report, "--report")
    command = CheckpointCommand.read(command_line, {"data.seq_length": flags.seq_length})
    if flags.sparsity is not None:
        return _sparsify(command, calibration, argv)
    check_pruning(command.folder, flags.output, command.config, options, calibration)
    if not command.runs_here:
        return command.launch("compress", ["prune", *argv])
    rank = int(os.environ.get("RANK", "0"))
    configure_logging(rank)
    pruned = prune_checkpoint(
        command.folder,
        flags.output,
        calibration,
        options,
        overrides=command_line.overrides,
        report=_report if rank == 0 else _say_nothing,
        on_progress=_Shown(),
    )
    if rank == 0:
        _print(pruned, as_json=flags.json)
        if flags.report is not None:
            write_page(pruned, flags.report)
    return 0


def _sparsify(command: CheckpointCommand, calibration: CalibrationText, argv: list[str]) -> int:
    """Write zeros instead of a smaller model.

    Raises:
        ConfigError: Sizes are given as well.
    """
    flags = command.command_line.flags
    sizes = ("num_layers", "drop_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups")
    if given := [f"--{name.replace('_', '-')}" for name in (*sizes, "report") if getattr(flags, name) is not None]:
        raise ConfigError(
            f"--sparsity does not go together with {' and '.join(given)}",
            hint="prune first, then give the result to this command again",
        )
    options = SparseOptions(sparsity=flags.sparsity, method=flags.method, overwrite=flags.overwrite)
    check_sparsity(command.folder, flags.output, command.config, options)
    if not command.runs_here:
        return command.launch("compress", ["prune", *argv])
    rank = int(os.environ.get("RANK", "0"))
    configure_logging(rank)
    sparse = sparsify_checkpoint(
        command.folder,
        flags.output,
        calibration,
        options,
        overrides=command.command_line.overrides,
        report=_report if rank == 0 else _say_nothing,
        on_progress=_Shown(),
    )
    if rank == 0 and flags.json:
        print(json.dumps(sparse.to_dict(), allow_nan=False))
    elif rank == 0:
        print("", *align(sparse.rows(), num_left=1), sep="\n")
        before, after = perplexity(sparse.loss_before), perplexity(sparse.loss_after)
        print(f"perplexity of {sparse.held_out_tokens:,} held-out tokens: {before:.3f} before, {after:.3f} after")
    return 0


def _parser() -> Parser:
    parser = checkpoint_parser("compress prune", SUMMARY)
    parser.add_argument("--output", type=Path, required=True, metavar="C2", help="checkpoint to write")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier output of this command")
    parser.add_argument(
        "--report", type=Path, metavar="F.html", help="page with the scores of what was removed and kept"
    )
    parser.add_argument("--json", action="store_true", help="the last line of the output is one JSON object")
    text = parser.add_argument_group("text that activations are measured on")
    text.add_argument(
        "--calibration", type=Path, required=True, metavar="F", help="text, JSONL, conversations, or a corpus prefix"
    )
    text.add_argument("--num-samples", type=int, default=128, help="samples of it")
    text.add_argument("--seq-length", type=int, help="tokens of a sample; 512 or the model's context by default")
    text.add_argument("--json-key", default="text", metavar="KEY", help="which key of a record holds the text")
    text.add_argument(
        "--held-out", type=Path, metavar="F", help="text that perplexity is measured on; default: samples between those"
    )
    text.add_argument("--num-held-out", type=int, default=32, help="samples that perplexity is measured on")
    depth = parser.add_argument_group("depth")
    depth.add_argument("--num-layers", type=int, help="layers that are left")
    depth.add_argument("--depth-score", choices=DEPTH_SCORES, default="block_influence", help="what judges layers")
    depth.add_argument(
        "--contiguous",
        action=argparse.BooleanOptionalAction,
        help="remove layers that follow one another; default: with angular only",
    )
    depth.add_argument("--drop-layers", metavar="I,J,…", help="remove these, from 0, whatever scores say")
    width = parser.add_argument_group("width, by the size of activations")
    width.add_argument("--hidden-size", type=int, help="width of the residual stream that is left")
    width.add_argument("--ffn-hidden-size", type=int, help="neurons of an MLP that are left")
    width.add_argument("--num-attention-heads", type=int, help="query heads that are left")
    width.add_argument("--num-query-groups", type=int, help="key-value heads that are left, with their query heads")
    zeros = parser.add_argument_group("zeros instead of a smaller model")
    zeros.add_argument("--sparsity", metavar="0.5|2:4", help="share of the weights of each row, or two in every four")
    zeros.add_argument(
        "--method", choices=["magnitude", "wanda", "sparsegpt"], default="wanda", help="what chooses them"
    )
    return parser


def _seq_length(flags: argparse.Namespace) -> int:
    """Return how many tokens a sample has.

    Raises:
        ConfigError: More than the model reads.
    """
    context = read_config(resolve_checkpoint(flags.checkpoint)).model.max_position_embeddings
    if flags.seq_length is None:
        return min(_SEQ_LENGTH, context)
    if flags.seq_length > context:
        raise ConfigError(f"--seq-length is {flags.seq_length:,}, and the model's context is {context:,}")
    length: int = flags.seq_length
    return length


def _check_numbers(flags: argparse.Namespace) -> None:
    for name in ("num_samples", "num_held_out", "seq_length"):
        if getattr(flags, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} is {getattr(flags, name)}, expected at least 1")


def _calibration(flags: argparse.Namespace) -> CalibrationText:
    return CalibrationText(
        file=flags.calibration,
        held_out=flags.held_out,
        num_samples=flags.num_samples,
        num_held_out=flags.num_held_out,
        seq_length=flags.seq_length,
        key=flags.json_key,
    )


def _options(flags: argparse.Namespace) -> PruneOptions:
    return PruneOptions(
        num_layers=flags.num_layers,
        drop_layers=_numbers(flags.drop_layers),
        depth_score=flags.depth_score,
        contiguous=flags.contiguous,
        hidden_size=flags.hidden_size,
        ffn_hidden_size=flags.ffn_hidden_size,
        num_attention_heads=flags.num_attention_heads,
        num_query_groups=flags.num_query_groups,
        overwrite=flags.overwrite,
    )


def _numbers(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"--drop-layers is {text!r}, expected numbers such as 21,22,23") from None


class _Shown:
    """Progress: a line for each thing that is measured."""

    def __init__(self) -> None:
        self._what, self._line = "", LineProgress("samples")

    def __call__(self, what: str, done: int, total: int) -> None:
        """Print how far it is, if that is due."""
        if what != self._what:
            unit = "candidates" if "left out" in what else "matrices" if "matrices" in what else "samples"
            self._what, self._line = what, LineProgress(unit)
        self._line.update(done, total, what)


def _report(topic: str, message: str) -> None:
    if topic == "warning":
        print(f"warning: {message}", file=sys.stderr)
    else:
        print(f"{topic:<8} {message}", flush=True)


def _say_nothing(_topic: str, _message: str) -> None:
    """Be the report of a rank that is not the main one."""


def _print(pruned: PrunedCheckpoint, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(pruned.to_dict(), allow_nan=False))
        return
    print()
    print("\n".join(align(pruned.rows(), num_left=1)))
    for line in pruned.removed_lines():
        print(line)
    print(f"\nnext:\n  {pruned.healing_command()}")
