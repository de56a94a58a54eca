#!/usr/bin/env python3
"""What the quickstart reached: loss against the unigram entropy, and the time of a step at both layouts.

    examples/quickstart_summary.py quickstart_run --entropy 6.5 --stopped-at 100 --margin 0.5

Exits with 1 unless the validation loss is below the entropy by at least the margin.
"""

import argparse
import json
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

UNSETTLED_STEPS = 3  # after a start, the first steps allocate memory and warm caches up


def main() -> int:
    """Read metrics.jsonl and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what the quickstart wrote")
    parser.add_argument("--entropy", type=float, required=True, help="unigram entropy of the corpus, in nats per token")
    parser.add_argument("--stopped-at", type=int, required=True, help="steps before the change of layout")
    parser.add_argument("--margin", type=float, required=True, help="nats between the two, at least")
    arguments = parser.parse_args()

    lines = (arguments.folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    steps = [record for record in records if "loss" in record]
    validations = [record["validation_loss"] for record in records if "validation_loss" in record]
    if [record["step"] for record in steps] != list(range(1, len(steps) + 1)):
        raise SystemExit("quickstart: the steps in metrics.jsonl are not 1, 2, 3, …: the resume lost or repeated some")

    table = Table("", "tensor parallel", "pipeline parallel")
    legs = steps[: arguments.stopped_at], steps[arguments.stopped_at :]
    table.add_row("steps", *(f"{leg[0]['step']} to {leg[-1]['step']}" for leg in legs))
    table.add_row("training loss, first and last", *(f"{leg[0]['loss']:.3f}, {leg[-1]['loss']:.3f}" for leg in legs))
    for unit, key in (("seconds per step", "step_seconds"), ("tokens per second", "tokens_per_second")):
        settled = [[record[key] for record in leg[UNSETTLED_STEPS:] or leg] for leg in legs]
        table.add_row(f"{unit} (median)", *(f"{median(values):,.2f}" for values in settled))
    Console().print(table)

    loss, entropy = validations[-1], arguments.entropy
    print(f"validation loss  {loss:.3f} nats per token (first validation {validations[0]:.3f})")
    print(f"unigram entropy  {entropy:.3f}: {entropy - loss:.3f} above the validation loss")
    if loss > entropy - arguments.margin:
        print(f"quickstart: expected at least {arguments.margin} nats between the two after {len(steps)} steps")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
