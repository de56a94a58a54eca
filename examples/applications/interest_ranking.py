#!/usr/bin/env python3
r"""Rank items by the interest that a model predicts for their texts, and measure rankings where the truth is known.

    megatron-7b finetune --config classify_tiny_cpu --run-dir interest --checkpoint.initialize-from minilm \
        --data.train read.jsonl                     # {"text": profile, "text_pair": item, "label": 0.0 … 1.0}
    megatron-7b predict --checkpoint interest --input candidates.jsonl --output predicted.jsonl
    examples/applications/interest_ranking.py predicted.jsonl --group user --top 5

Predictions are numbers (regression), or classes: then --interesting names the one whose probability counts. A line of
the output is {"user": …, "items": […]}, the most interesting first. Where records have a "label", normalized discounted
cumulative gain and the mean reciprocal rank of the first relevant item are printed for the first `--top` items.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def interest_of(record: Mapping[str, Any], interesting: str) -> float:
    """Return what is predicted for a record."""
    prediction = record["prediction"]
    return float(prediction["value"] if "value" in prediction else prediction["scores"][interesting])


def relevance_of(record: Mapping[str, Any], interesting: str) -> float:
    """Return what is known of a record: its number, or 1 for the label that counts."""
    label = record["label"]
    return float(label == interesting) if isinstance(label, str) else float(label)


def measure(relevance: Sequence[Sequence[float]], top: int) -> dict[str, float]:
    """Return nDCG and MRR of the first items of rankings, given how relevant each item is, in ranked order."""
    from sklearn.metrics import ndcg_score

    gains, reciprocals = [], []
    for one in relevance:
        if len(one) < 2 or max(one) <= 0:
            continue  # every order is as good as another
        gains.append(ndcg_score([one], [list(range(len(one), 0, -1))], k=top))
        hits = [place for place, value in enumerate(one[:top], start=1) if value == max(one)]
        reciprocals.append(1 / hits[0] if hits else 0.0)
    if not gains:
        return {}
    return {f"ndcg@{top}": sum(gains) / len(gains), f"mrr@{top}": sum(reciprocals) / len(gains), "rankings": len(gains)}


def main(argv: list[str] | None = None) -> int:
    """Read predictions, and write a ranking for each group."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", type=Path, help="output of `megatron-7b predict`")
    parser.add_argument("--group", metavar="KEY", help="key of whom a ranking is for; default: one ranking for all")
    parser.add_argument("--item", default="text_pair", metavar="KEY", help="key of what is shown of an item")
    parser.add_argument(
        "--interesting", default="interesting", help="label that means interest, where classes are predicted"
    )
    parser.add_argument("--top", type=int, default=10, help="items of a ranking")
    parser.add_argument("--output", type=Path, metavar="FILE", help="JSON lines; default: standard output")
    flags = parser.parse_args(argv)
    records = [json.loads(line) for line in flags.input.read_text(encoding="utf-8").split("\n") if line.strip()]
    groups: dict[Any, list[dict[str, Any]]] = {}
    try:
        for record in records:
            groups.setdefault(record[flags.group] if flags.group else None, []).append(record)
        for items in groups.values():
            items.sort(key=lambda record: -interest_of(record, flags.interesting))
        lines = [
            json.dumps(
                {
                    **({flags.group: name} if flags.group else {}),
                    "items": [
                        {
                            flags.item: one.get(flags.item, one.get("text")),
                            "interest": interest_of(one, flags.interesting),
                        }
                        for one in items[: flags.top]
                    ],
                },
                ensure_ascii=False,
            )
            for name, items in groups.items()
        ]
    except KeyError as error:
        raise SystemExit(f"{flags.input}: a record or its prediction has no {error}") from None
    if flags.output is not None:
        flags.output.write_text("\n".join(lines) + "\n", encoding="utf-8")
    else:
        print("\n".join(lines))
    if records and all("label" in record for record in records):
        relevance = [[relevance_of(one, flags.interesting) for one in items] for items in groups.values()]
        print(json.dumps(measure(relevance, flags.top)), file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
