"""`megatron-7b compress quantize`: a model in fewer bits, and what it has lost."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_7b.cli.options import Parser, parse_arguments
from megatron_7b.cli.progress import LineProgress
from megatron_7b.cli.tables import align

if TYPE_CHECKING:
    from megatron_7b.compression import Quantized

SUMMARY = "write a checkpoint or a Hugging Face folder in fewer bits, and measure what it has lost"


def main(argv: list[str]) -> int:
    """Run the command; 0 when the output is published.

    Raises:
        MegatronError: The model cannot be quantised so, or loses too much; nothing was published.
    """
    flags = parse_arguments(build_parser(), argv).flags
    from megatron_7b.compression import QuantizeOptions, quantize

    options = QuantizeOptions(
        scheme=flags.scheme,
        method=flags.method,
        calibration=flags.calibration,
        held_out=flags.held_out,
        num_samples=flags.num_samples,
        seq_length=flags.seq_length,
        num_held_out=flags.num_held_out,
        group_size=flags.group_size,
        ignore=tuple(flags.ignore),
        damping=flags.damping,
        act_order=not flags.no_act_order,
        max_loss=flags.max_loss,
        force=flags.force,
        overwrite=flags.overwrite,
        max_shard_bytes=int(flags.max_shard_gib * 2**30),
    )
    progress = LineProgress("layers")
    result = quantize(
        flags.output, options, checkpoint=flags.checkpoint, hf=flags.hf, report=_report, on_layer=progress.update
    )
    if flags.json:
        print(json.dumps(result.to_dict(), ensure_ascii=False))
    else:
        _print_table(result)
    return 0


def build_parser() -> Parser:
    """Return the command line."""
    parser = Parser("compress quantize", SUMMARY)
    parser.add_argument("--checkpoint", type=Path, metavar="C", help="RUN/checkpoints/latest, …")
    parser.add_argument("--hf", type=Path, metavar="H", help="instead of a checkpoint: a Hugging Face folder")
    parser.add_argument("--output", type=Path, required=True, metavar="O", help="folder, or .gguf file, to write")
    parser.add_argument(
        "--scheme", required=True, help="w8a16, w8a8, w4a16, fp8, or gguf: and f16, bf16, q8_0, q6_k, q4_k_m, q4_0"
    )
    parser.add_argument(
        "--method",
        default="rtn",
        help="rtn rounds each weight; gptq lets others make up for it; awq scales by activations",
    )
    parser.add_argument("--calibration", metavar="F", help="text, records, conversations, or the PREFIX of a corpus")
    parser.add_argument("--num-samples", type=int, default=128, help="samples of it to look at")
    parser.add_argument("--seq-length", type=int, help="tokens of a sample; 512 or the model's context by default")
    parser.add_argument(
        "--held-out", metavar="F", help="text for perplexity; by default a part of --calibration that is not looked at"
    )
    parser.add_argument("--num-held-out", type=int, default=32, help="samples of it")
    parser.add_argument("--group-size", type=int, help="weights of a row that share a scale; 128 in w4a16, else a row")
    parser.add_argument(
        "--ignore",
        nargs="*",
        default=["lm_head"],
        metavar="NAME",
        help="matrices that stay as they are; re:… fits names",
    )
    parser.add_argument("--damping", type=float, default=0.01, help="of gptq: share of the mean added to the diagonal")
    parser.add_argument("--no-act-order", action="store_true", help="of gptq: take the inputs in their order")
    parser.add_argument("--max-loss", type=float, default=0.1, help="share by which perplexity may grow")
    parser.add_argument("--force", action="store_true", help="publish even if it grows more")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier output of this command")
    parser.add_argument("--max-shard-gib", type=float, default=4.0, help="largest weight file")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    return parser


def _print_table(result: "Quantized") -> None:
    def perplexity(value: float | None) -> str:
        return "not measured" if value is None else f"{value:,.3f}"

    smaller = result.bytes_after / max(1, result.bytes_before) - 1
    rows = [
        ("", "before", "after", "change"),
        ("bytes", f"{result.bytes_before:,}", f"{result.bytes_after:,}", f"{smaller:+.1%}"),
        (
            "perplexity",
            perplexity(result.perplexity_before),
            perplexity(result.perplexity_after),
            "" if result.loss is None else f"{result.loss:+.2%}",
        ),
    ]
    print(f"wrote {result.output}: {result.scheme} by {result.method}, {result.seconds:.1f} s")
    print("\n".join(align(rows, num_left=1)))
    if (worst := result.largest_error) is not None:
        of_output = "" if worst.of_output is None else f"{worst.of_output:.2%} of its output, "
        print(f"largest error: {worst.name}, {of_output}{worst.of_weight:.2%} of its weights")
    if result.scheme.startswith("gguf:") and result.kept:
        print(
            f"not in few bits but in F16, as their rows are no multiple of 32: {len(result.kept):,} matrices, such as "
            f"{result.kept[0]}"
        )
    if result.loss is None:
        print("perplexity: --held-out F.jsonl measures it")
    else:
        print(
            f"held-out text: {result.num_tokens:,} tokens; predictions differ by {result.divergence:.4f} nats per token"
        )


def _report(topic: str, message: str) -> None:
    print(f"{topic}: {message}" if topic == "warning" else f"{topic:<8} {message}", file=sys.stderr, flush=True)
