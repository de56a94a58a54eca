"""`megatron-7b convert to-hf|from-hf|grow`: checkpoints, Hugging Face folders and larger models, with proof.

    megatron-7b convert to-hf --checkpoint RUN/checkpoints/latest --output FOLDER
    megatron-7b convert from-hf --input FOLDER --output CHECKPOINT
    megatron-7b convert grow --checkpoint RUN/checkpoints/latest --output CHECKPOINT --num-layers 8

All compute the logits of the original and of the result, and publish the result only if they agree. (Stacked layers
change them; how far is printed.)
"""

import argparse
import difflib
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_7b.cli.options import Parser, parse_arguments
from megatron_7b.errors import ConfigError

if TYPE_CHECKING:
    from megatron_7b.conversion import GrownCheckpoint

SUMMARY = "turn a checkpoint into a Hugging Face folder, a folder into a checkpoint, or either into a larger model"

_ACTIONS = {
    "to-hf": "write a checkpoint of any layout as a Hugging Face folder",
    "from-hf": "write a Hugging Face folder as a checkpoint that any layout can train on",
    "grow": "write a larger model that starts from the weights of a smaller one",
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
    parser = Parser(f"convert {action}", _ACTIONS[action])
    add_options, run = {
        "to-hf": (_add_export_options, _export),
        "from-hf": (_add_import_options, _import),
        "grow": (_add_grow_options, _grow),
    }[action]
    add_options(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier output of this command")
    run(parse_arguments(parser, argv[1:]).flags)
    return 0


def _add_export_options(parser: Parser) -> None:
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
    parser.add_argument(
        "--merge", action="store_true", help="of an adapter: write the whole model, with the adapter in its weights"
    )
    parser.add_argument("--base", type=Path, metavar="B", help="of an adapter: where its model is now, if it was moved")
    parser.add_argument(
        "--base-name", metavar="NAME", help="of an adapter: what its folder calls the base, on the hub or as a path"
    )
    parser.add_argument(
        "--results", type=Path, nargs="+", default=[], metavar="F.json",
        help="what evaluations have written, for a model card (README.md); default: what `evaluate --keep` has kept",
    )  # fmt: skip
    _add_number_formats(parser)


def _add_import_options(parser: Parser) -> None:
    parser.add_argument(
        "--input", type=Path, required=True, metavar="H", help="folder with config.json, or adapter_config.json"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="C", help="checkpoint to write")
    parser.add_argument(
        "--max-position-embeddings",
        type=int,
        help="shorten the context; a sliding window that is no shorter is left out",
    )
    parser.add_argument(
        "--base", type=Path, metavar="B", help="of an adapter: its model, a checkpoint or a Hugging Face folder"
    )
    _add_number_formats(parser)


def _add_number_formats(parser: Parser) -> None:
    parser.add_argument(
        "--dtype", choices=["auto", "bf16", "fp32"], default="auto", help="stored number format; auto: as in the input"
    )
    parser.add_argument(
        "--parity-dtype",
        choices=["fp32", "bf16"],
        default="fp32",
        help="arithmetic of the comparison; bf16 halves its memory, and cannot see small faults",
    )


def _add_grow_options(parser: Parser) -> None:
    parser.add_argument(
        "--checkpoint", type=Path, required=True, metavar="C", help="the smaller model; a Hugging Face folder, too"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="D", help="checkpoint to write")
    parser.add_argument("--num-layers", type=int, help="layers of the larger model")
    parser.add_argument("--num-decoder-layers", type=int, help="layers of an encoder-decoder's decoder")
    parser.add_argument("--hidden-size", type=int, help="width of its residual stream")
    parser.add_argument("--ffn-hidden-size", type=int, help="inner width of its MLPs")
    parser.add_argument(
        "--num-attention-heads",
        type=int,
        help="its query heads, as wide as before; they follow --hidden-size by default",
    )
    parser.add_argument(
        "--num-query-groups", type=int, help="its key-value heads; by default they follow the query heads"
    )
    parser.add_argument(
        "--method",
        choices=["preserve", "stack"],
        default="preserve",
        help="how layers are added: copies that change nothing until they are trained, or all layers again on top of "
        "themselves, which changes what the model computes",
    )
    parser.add_argument("--seed", type=int, default=1234, help="of the draw that tells copies apart")


def _export(flags: argparse.Namespace) -> None:
    from megatron_7b.conversion import ExportOptions, export_to_hugging_face

    options = ExportOptions(
        dtype=flags.dtype,
        parity_dtype=flags.parity_dtype,
        max_shard_bytes=int(flags.max_shard_gib * 2**30),
        allow_other_token_ids=flags.allow_other_token_ids,
        overwrite=flags.overwrite,
        merge=flags.merge,
        base=flags.base,
        base_name=flags.base_name,
        results=tuple(flags.results),
    )
    export_to_hugging_face(flags.checkpoint, flags.output, options, _report)


def _import(flags: argparse.Namespace) -> None:
    from megatron_7b.conversion import ImportOptions, import_from_hugging_face

    options = ImportOptions(
        dtype=flags.dtype,
        parity_dtype=flags.parity_dtype,
        max_position_embeddings=flags.max_position_embeddings,
        overwrite=flags.overwrite,
        base=flags.base,
    )
    import_from_hugging_face(flags.input, flags.output, options, _report)


def _grow(flags: argparse.Namespace) -> None:
    from megatron_7b.conversion import GrowOptions, grow_checkpoint

    options = GrowOptions(
        num_layers=flags.num_layers,
        num_decoder_layers=flags.num_decoder_layers,
        hidden_size=flags.hidden_size,
        ffn_hidden_size=flags.ffn_hidden_size,
        num_attention_heads=flags.num_attention_heads,
        num_query_groups=flags.num_query_groups,
        method=flags.method,
        seed=flags.seed,
        overwrite=flags.overwrite,
    )
    print(
        f"\nnext:\n  {shlex.join(training_command(grow_checkpoint(flags.checkpoint, flags.output, options, _report)))}"
    )


def training_command(grown: "GrownCheckpoint") -> list[str]:
    """Return the command that trains a larger model with the settings and the data of the smaller one's run."""
    corpus = [] if grown.config.data.train else ["--data.train", "PREFIX_text_document"]
    return [
        *("megatron-7b", "pretrain", "--config", str(grown.folder / "config.yaml")),
        *("--checkpoint.initialize-from", str(grown.folder), *corpus),
        *("--run-dir", f"{grown.folder}_run"),
    ]


def _report(topic: str, message: str) -> None:
    if topic == "warning":
        print(f"warning: {message}", file=sys.stderr)
    else:
        print(f"{topic:<8} {message}", flush=True)
