"""`megatron-7b data …`: clean raw files; look into tokenized corpora, check them, join them, plan with them."""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING

from megatron_7b.cli.commands.data_chat import add_chat
from megatron_7b.cli.commands.data_corpora import add_adopt, add_merge, add_verify
from megatron_7b.errors import ConfigError

if TYPE_CHECKING:
    from megatron_7b.data.corpus.show import CorpusStatistics, ShownDocument

SUMMARY = "Clean raw files; show, verify, adopt, merge and plan with tokenized corpora; show conversations."

_IDS_SHOWN = 64


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(prog="megatron-7b data", description=SUMMARY)
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    actions.add_parser("prepare", help="raw files to clean, deduplicated, split JSONL, with a report", add_help=False)
    _add_show(actions)
    add_verify(actions)
    add_adopt(actions)
    add_merge(actions)
    add_chat(actions)
    actions.add_parser("plan", help="what a run as configured takes from each set", add_help=False)
    return parser


def main(argv: list[str]) -> int:
    """Run the command; 0 on success.

    Raises:
        MegatronError: A mistake that the user can fix.
    """
    # These take the flags of a configuration, and load what reads them.
    if argv[:1] == ["plan"]:
        from megatron_7b.cli.commands import data_plan

        return data_plan.main(argv[1:])
    if argv[:1] == ["prepare"]:
        from megatron_7b.cli.commands import data_prepare

        return data_prepare.main(argv[1:])
    arguments = build_parser().parse_args(argv)
    action: Callable[[argparse.Namespace], int] = arguments.run
    return action(arguments)


def _add_show(actions: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    show = actions.add_parser(
        "show",
        help="print the first documents as text, and statistics",
        description="Print the first documents of PREFIX.bin/.idx as text, and statistics of the whole corpus.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    show.set_defaults(run=_show)
    show.add_argument("prefix", metavar="PREFIX", help="path of both files, without extension or _text_document")
    show.add_argument("--documents", type=int, default=3, metavar="N", help="documents to print")
    show.add_argument("--first", type=int, default=0, metavar="D", help="number of the first one")
    show.add_argument("--characters", type=int, default=800, metavar="N", help="of each document's text; 0 for all")
    show.add_argument("--tokenizer", metavar="DIR", help="instead of the one that the manifest PREFIX.json names")
    show.add_argument(
        "--json", action="store_true", help="one JSON object: statistics, and documents with ids and text"
    )


def _show(arguments: argparse.Namespace) -> int:
    from megatron_7b.data.corpus.show import show_corpus
    from megatron_7b.tokenizer import load_tokenizer

    if arguments.characters < 0:
        raise ConfigError(f"--characters is {arguments.characters}, expected 0 or more")
    shown = show_corpus(
        arguments.prefix,
        first=arguments.first,
        num_documents=arguments.documents,
        tokenizer=None if arguments.tokenizer is None else load_tokenizer(arguments.tokenizer),
        say=lambda text: print(f"note: {text}", file=sys.stderr),
    )
    if arguments.json:
        documents = [asdict(document) for document in shown.documents]
        print(json.dumps({**asdict(shown.statistics), "shown": documents}, ensure_ascii=False))
        return 0
    for document in shown.documents:
        _print_document(document, arguments.characters)
    _print_statistics(shown.statistics)
    return 0


def _print_document(document: "ShownDocument", characters: int) -> None:
    ids, text = document.ids, document.text
    print(f"--- document {document.document}: {len(ids):,} tokens")
    if text is None:
        more = f" … and {len(ids) - _IDS_SHOWN:,} more" if len(ids) > _IDS_SHOWN else ""
        print(" ".join(map(str, ids[:_IDS_SHOWN])) + more)
        return
    cut = characters and len(text) > characters
    print(f"{text[:characters]} … and {len(text) - characters:,} characters more" if cut else text)


def _print_statistics(statistics: "CorpusStatistics") -> None:
    def shown(value: float | None) -> str:
        return "-" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:,.1f}"

    size = f"{shown(statistics.bin_bytes)} bytes .bin, {shown(statistics.idx_bytes)} bytes .idx"
    rows = {
        "corpus": statistics.prefix,
        "documents": f"{shown(statistics.documents)} ({shown(statistics.empty_documents)} of them empty)",
        "tokens": f"{shown(statistics.tokens)} of type {statistics.dtype}",
        "document length": f"min {shown(statistics.min_length)}, median {shown(statistics.median_length)}, "
        f"max {shown(statistics.max_length)}",
        "id range": f"{shown(statistics.min_id)} to {shown(statistics.max_id)}",
        "size": size,
    }
    print("---")
    for name, value in rows.items():
        print(f"{name:<16}{value}")
