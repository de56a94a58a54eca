"""`megatron-7b tokenizer fertility`: tokens per word and bytes per token, by language or file."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from megatron_7b.cli.bad_records import print_bad_records
from megatron_7b.cli.tables import align

if TYPE_CHECKING:
    from megatron_7b.evaluation.fertility import FertilityReport


def add_fertility(actions: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    fertility = actions.add_parser(
        "fertility",
        help="count the tokens that tokenizers spend on words, by language or file",
        description="Count the tokens that tokenizers spend on the words of a text (fertility: less is better), and "
        "the bytes of text per token (more is better), by language, file or a key of the records.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    fertility.set_defaults(run=_measure)
    fertility.add_argument("tokenizers", nargs="+", metavar="TOKENIZER", help="folder or file, or the word bytes")
    fertility.add_argument(
        "--input", nargs="+", required=True, metavar="F", help="files, globs or folders, as `preprocess` reads"
    )
    fertility.add_argument(
        "--by", default="file", metavar="file|language|KEY", help="lid.176's language, or the value of a record's key"
    )
    fertility.add_argument("--json-key", default="text", metavar="KEY", help="which key of a record holds the text")
    fertility.add_argument(
        "--sample-mb", type=float, metavar="MB", help="look at this much of the input, evenly spread; all if absent"
    )
    fertility.add_argument("--json", action="store_true", help="print the counts as JSON")


def _measure(arguments: argparse.Namespace) -> int:
    from megatron_7b.cli.progress import open_progress
    from megatron_7b.evaluation.fertility import measure_fertility
    from megatron_7b.tokenizer import load_tokenizer

    report = measure_fertility(
        arguments.input,
        [load_tokenizer(name) for name in arguments.tokenizers],
        key=arguments.json_key,
        by=arguments.by,
        sample_mb=arguments.sample_mb,
        open_progress=open_progress,
    )
    if arguments.json:
        print(json.dumps(_to_json(report, arguments.tokenizers), indent=2, ensure_ascii=False))
        return 0
    print("\n".join(align(_rows(report, arguments.by, arguments.tokenizers), num_left=2)))
    print_bad_records(report.bad)
    return 0


def _to_json(report: "FertilityReport", names: Sequence[str]) -> dict[str, object]:
    groups = {
        group: {
            **asdict(fertility.text),
            "tokenizers": {name: asdict(count) for name, count in zip(names, fertility.tokens, strict=True)},
        }
        for group, fertility in report.groups.items()
    }
    return {"groups": groups, "bad_records": len(report.bad)}


def _rows(report: "FertilityReport", by: str, names: Sequence[str]) -> list[list[str]]:
    """Return the heads, and a row per group and tokenizer."""
    return [
        [by, "tokenizer", "documents", "words", "tokens", "tokens/word", "bytes/token", "altered"],
        *(
            [
                group,
                name,
                f"{fertility.text.documents:,}",
                f"{fertility.text.words:,}",
                f"{count.tokens:,}",
                f"{count.tokens / max(1, fertility.text.words):.2f}",
                f"{fertility.text.bytes / max(1, count.tokens):.2f}",
                f"{count.altered:,}",
            ]
            for group, fertility in report.groups.items()
            for name, count in zip(names, fertility.tokens, strict=True)
        ),
    ]
