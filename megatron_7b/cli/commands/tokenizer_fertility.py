"""`megatron-7b tokenizer fertility`: tokens per word and bytes per token, by language or file."""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from megatron_7b.errors import ConfigError

if TYPE_CHECKING:
    from megatron_7b.cli.fertility_counts import Fertility
    from megatron_7b.data.reading.records import BadRecord

_NUM_BAD_NAMED = 10


def add_fertility(actions: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    fertility = actions.add_parser(
        "fertility",
        help="count the tokens that tokenizers spend on words, by language or file",
        description="Count the tokens that tokenizers spend on the words of a text (fertility: less is better), and "
        "the bytes that a token stands for (more is better), by language, file or a key of the records.",
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
        "--sample-mb", type=float, metavar="MB", help="look at so much of the input, evenly spread; all if absent"
    )
    fertility.add_argument("--json", action="store_true", help="print the counts as JSON")


def _measure(arguments: argparse.Namespace) -> int:
    from megatron_7b.cli.fertility_counts import measure_fertility
    from megatron_7b.cli.progress import open_progress
    from megatron_7b.data.reading.sources import find_sources
    from megatron_7b.tokenizer import load_tokenizer

    if arguments.sample_mb is not None and not arguments.sample_mb > 0:
        raise ConfigError(f"--sample-mb is {arguments.sample_mb:g}, expected more than 0")
    tokenizers = [load_tokenizer(name) for name in arguments.tokenizers]
    sources = find_sources(arguments.input)
    size = max(1, sum(source.size for source in sources))
    share = 1.0 if arguments.sample_mb is None else min(1.0, arguments.sample_mb * 1e6 / size)
    bad: list[BadRecord] = []
    with open_progress(size) as progress:
        found = measure_fertility(
            sources,
            tokenizers,
            key=arguments.json_key,
            by=arguments.by,
            share=share,
            bad=bad,
            on_block=lambda *counts: progress.update(sum(source.bytes_read for source in sources), *counts),
        )
    if arguments.json:
        print(json.dumps(_to_json(found, arguments.tokenizers, bad), indent=2, ensure_ascii=False))
        return 0
    print(_format_table(found, arguments.by, arguments.tokenizers))
    if bad:
        print(f"{len(bad):,} bad records left out, the first:")
        for record in bad[:_NUM_BAD_NAMED]:
            print(f"  {record}")
    return 0


def _to_json(found: "Mapping[str, Fertility]", names: Sequence[str], bad: "Sequence[BadRecord]") -> dict[str, object]:
    groups = {
        group: {
            **asdict(fertility.text),
            "tokenizers": {name: asdict(count) for name, count in zip(names, fertility.tokens, strict=True)},
        }
        for group, fertility in found.items()
    }
    return {"groups": groups, "bad_records": len(bad)}


def _format_table(found: "Mapping[str, Fertility]", by: str, names: Sequence[str]) -> str:
    """A line per group and tokenizer, columns aligned."""
    heads = [by, "tokenizer", "documents", "words", "tokens", "tokens/word", "bytes/token", "altered"]
    rows = [
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
        for group, fertility in found.items()
        for name, count in zip(names, fertility.tokens, strict=True)
    ]
    widths = [max(len(row[column]) for row in [heads, *rows]) for column in range(len(heads))]
    lines = [
        "  ".join(
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in [heads, *rows]
    ]
    return "\n".join(line.rstrip() for line in lines)
