"""`megatron-7b convert to-hf|from-hf`: between our checkpoints and Hugging Face folders, with proof.

    megatron-7b convert to-hf --checkpoint RUN/checkpoints/latest --output FOLDER
    megatron-7b convert from-hf --input FOLDER --output CHECKPOINT

Both compute the logits of the original and of the result, and publish the result only if they agree.
"""

import argparse
import difflib
import sys
from pathlib import Path

from megatron_7b.cli.options import Parser, parse_arguments
from megatron_7b.errors import ConfigError

SUMMARY = "turn a checkpoint into a Hugging Face folder, or a folder into a checkpoint"

_ACTIONS = {
    "to-hf": "write a checkpoint of any layout as a Hugging Face folder",
    "from-hf": "write a Hugging Face folder as a checkpoint that any layout can train on",
}


def main(argv: list[str]) -> int:
    """Run the command.

    Returns:
        0 when the output is published.

    Raises:
        MegatronError: The input cannot be converted exactly, or the models differ; nothing was published.
    """
    action = argv[0] if argv else "--help"
    if action in ("-h", "--help", "help"):
        lines = [f"  {name:<10}{summary}" for name, summary in _ACTIONS.items()]
        print("usage: megatron-7b convert ACTION [options]", "", SUMMARY, "", *lines, sep="\n")
        return 0 if argv else 2
    if action not in _ACTIONS:
        guess = difflib.get_close_matches(action, _ACTIONS, n=1)
        raise ConfigError(
            f"unknown action {action!r}, expected {' or '.join(_ACTIONS)}",
            hint=f"did you mean {guess[0]}?" if guess else None,
        )
    flags = parse_arguments(_parser(action), argv[1:]).flags
    _export(flags) if action == "to-hf" else _import(flags)
    return 0


def _parser(action: str) -> Parser:
    parser = Parser(f"convert {action}", _ACTIONS[action])
    if action == "to-hf":
        parser.add_argument("--checkpoint", type=Path, required=True, metavar="C", help="RUN/checkpoints/latest, …")
        parser.add_argument("--output", type=Path, required=True, metavar="H", help="folder to write")
        parser.add_argument(
            "--max-shard-gib", type=float, default=4.0, help="largest weight file, and about the memory writing takes"
        )
        parser.add_argument(
            "--allow-other-token-ids",
            action="store_true",
            help="publish even if transformers gives text other ids than the checkpoint's tokenizer",
        )
    else:
        parser.add_argument("--input", type=Path, required=True, metavar="H", help="folder with config.json")
        parser.add_argument("--output", type=Path, required=True, metavar="C", help="checkpoint to write")
        parser.add_argument(
            "--max-position-embeddings", type=int, help="shorten the context, to within a model's sliding window"
        )
    parser.add_argument(
        "--dtype", choices=["auto", "bf16", "fp32"], default="auto", help="stored number format; auto: as in the input"
    )
    parser.add_argument(
        "--parity-dtype",
        choices=["fp32", "bf16"],
        default="fp32",
        help="arithmetic of the comparison; bf16 halves its memory, and cannot see small faults",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier output of this command")
    return parser


def _export(flags: argparse.Namespace) -> None:
    from megatron_7b.conversion import ExportOptions, export_to_hugging_face

    options = ExportOptions(
        dtype=flags.dtype,
        parity_dtype=flags.parity_dtype,
        max_shard_bytes=int(flags.max_shard_gib * 2**30),
        allow_other_token_ids=flags.allow_other_token_ids,
        overwrite=flags.overwrite,
    )
    export_to_hugging_face(flags.checkpoint, flags.output, options, _report)


def _import(flags: argparse.Namespace) -> None:
    from megatron_7b.conversion import ImportOptions, import_from_hugging_face

    options = ImportOptions(
        dtype=flags.dtype,
        parity_dtype=flags.parity_dtype,
        max_position_embeddings=flags.max_position_embeddings,
        overwrite=flags.overwrite,
    )
    import_from_hugging_face(flags.input, flags.output, options, _report)


def _report(topic: str, message: str) -> None:
    if topic == "warning":
        print(f"warning: {message}", file=sys.stderr)
    else:
        print(f"{topic:<8} {message}", flush=True)
