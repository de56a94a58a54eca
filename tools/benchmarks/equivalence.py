#!/usr/bin/env python3
"""The equivalence table: every kind of parallelism beside one rank, in FP32 and BF16, as rows of Markdown.

    python tools/benchmarks/equivalence.py
    python tools/benchmarks/equivalence.py --precision bf16 --model experts --steps 10

Runs `megatron-7b parity` on small models: a dense one whose samples are whole windows, the same with documents apart
(packed), and a mixture of experts. Ends with code 1 if a layout parts from one rank, or, in FP32, if a loss or the
gradient of a parameter is more than 1e-5 from that of one rank.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
SHAPE = (
    *("--model.num-layers", "4", "--model.hidden-size", "64", "--model.ffn-hidden-size", "96"),
    *("--model.num-attention-heads", "4", "--model.num-query-groups", "2", "--data.seq-length", "64"),
    *("--training.micro-batch-size", "2", "--training.global-batch-size", "8", "--runtime.num-threads", "1"),
)
ONE_RANK = "tp=1"
MODELS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "dense": (
        ("--config", "tiny_cpu"),
        (
            *("tp=2", "tp=2 sp", "pp=2", "pp=2 vpp=2", "cp=2", "dp=2", "dp=2 zero1", "dp=2 zero1 overlap"),
            *("recompute=full", "recompute=selective", "tp=2 sp pp=2", "tp=2 sp cp=2", "pp=2 dp=2 zero1"),
        ),
    ),
    "packed": (
        ("--config", "tiny_cpu", "--data.reset-attention-mask", "True", "--data.reset-position-ids", "True"),
        ("tp=2 sp", "pp=2", "cp=2", "dp=2 zero1", "recompute=full", "tp=2 sp cp=2"),
    ),
    "experts": (
        ("--config", "moe_tiny_cpu"),
        (
            *("ep=2 dp=2", "ep=2 dp=2 zero1", "ep=2 cp=2", "tp=2 sp", "pp=2", "recompute=full"),
            *("ep=2 dp=2 tp=2 sp", "ep=2 dp=2 pp=2"),
        ),
    ),
}
KINDS = ("loss", "gradient norm", "gradient", "weight")
FP32_BOUND = 1e-5


def main() -> int:
    """Print the table, a row as soon as it is known."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--precision", action="append", choices=("fp32", "bf16"), help="default: both")
    parser.add_argument("--model", action="append", choices=tuple(MODELS), help="default: all")
    parser.add_argument("--steps", type=int, default=5, help="updates to compare")
    arguments = parser.parse_args()
    agrees = True
    for precision in arguments.precision or ("fp32", "bf16"):
        last = " | of one rank's error" if precision == "bf16" else ""
        heads = f"| {precision.upper()}, {arguments.steps} steps | layout | {' | '.join(KINDS)}{last} |"
        print(f"\n{heads}\n|{'---|' * (heads.count('|') - 1)}")
        for model in arguments.model or MODELS:
            for layout in compare(model, precision, arguments.steps):
                print(row(model, layout, precision), flush=True)
                agrees &= layout["agrees"] and (precision != "fp32" or is_within(layout))
    return 0 if agrees else 1


def compare(model: str, precision: str, steps: int) -> list[dict[str, Any]]:
    """Return what `parity` says of each layout of a model."""
    options, layouts = MODELS[model]
    asked = [word for layout in (ONE_RANK, *layouts) for word in ("--layout", layout)]
    command = ["parity", *options, *SHAPE, "--precision.params-dtype", precision, "--steps", str(steps), *asked]
    done = subprocess.run(
        [sys.executable, "-m", "megatron_7b", *command, "--json"], check=False, stdout=subprocess.PIPE, text=True,
        cwd=REPOSITORY,
    )  # fmt: skip
    if done.returncode not in (0, 1):
        sys.exit(done.returncode)
    found: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])["layouts"]
    return found


def row(model: str, layout: dict[str, Any], precision: str) -> str:
    """Return one row of the table."""
    cells = [f"{layout['largest'][kind]['distance']:.1e}" for kind in KINDS]
    if precision == "bf16":
        nearest = layout["nearest_to_bound"]
        cells.append(f"{layout['times_error']:.2f} ({nearest['what']} {nearest['name']})".replace(" )", ")"))
    name = layout["layout"] if layout["agrees"] else f"**{layout['layout']} parts**"
    return f"| {model} | {name} | {' | '.join(cells)} |"


def is_within(layout: dict[str, Any]) -> bool:
    """Return whether losses and gradients are as near as the format allows."""
    return all(layout["largest"][kind]["distance"] < FP32_BOUND for kind in ("loss", "gradient"))


if __name__ == "__main__":
    sys.exit(main())
