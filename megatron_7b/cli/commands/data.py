"""`megatron-7b data …`: clean raw files; look into tokenized corpora, check them, join them, plan with them."""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_7b.cli.commands.data_chat import add_chat
from megatron_7b.cli.commands.data_corpora import add_adopt, add_merge, add_verify
from megatron_7b.errors import ConfigError

if TYPE_CHECKING:
    from megatron_7b.data.corpus.indexed_dataset import IndexedDataset
    from megatron_7b.data.corpus.show import CorpusStatistics
    from megatron_7b.tokenizer import Tokenizer

SUMMARY = "Clean raw files; show, verify, adopt, merge and plan with tokenized corpora; show conversations."

_IDS_SHOWN = 64


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
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
    from megatron_7b.data.corpus.indexed_dataset import IndexedDataset
    from megatron_7b.data.corpus.show import corpus_statistics

    for name in ("documents", "first", "characters"):
        if getattr(arguments, name) < 0:
            raise ConfigError(f"--{name} is {getattr(arguments, name)}, expected 0 or more")
    dataset = IndexedDataset(arguments.prefix)
    statistics = corpus_statistics(dataset)
    tokenizer = _find_tokenizer(dataset.prefix, arguments.tokenizer)
    if tokenizer is not None and statistics.max_id is not None and statistics.max_id >= tokenizer.vocab_size:
        size = f"{tokenizer.vocab_size} tokens of the {tokenizer.kind} tokenizer"
        _note(f"the largest id is {statistics.max_id}, beyond the {size}, so ids are shown")
        tokenizer = None
    if arguments.first > max(0, dataset.num_documents - 1):
        raise ConfigError(f"--first is {arguments.first}, expected 0 to {dataset.num_documents - 1}, the last document")
    last = min(dataset.num_documents, arguments.first + arguments.documents)
    numbers = range(arguments.first, last)
    if arguments.json:
        documents = [_document_record(dataset, number, tokenizer) for number in numbers]
        print(json.dumps({**asdict(statistics), "shown": documents}, ensure_ascii=False))
        return 0
    for number in numbers:
        _print_document(dataset, number, tokenizer, arguments.characters)
    _print_statistics(statistics)
    return 0


def _find_tokenizer(prefix: str, given: str | None) -> "Tokenizer | None":
    """The tokenizer on the command line, else the manifest's, else None with a note that says why."""
    from megatron_7b.data.corpus.manifest_reader import load_tokenizer_facts
    from megatron_7b.tokenizer import load_tokenizer

    named = load_tokenizer_facts(prefix)
    if given is not None:
        tokenizer = load_tokenizer(given)
    elif named is None:
        _note(f"no manifest at {prefix}.json names a tokenizer, so ids are shown; --tokenizer DIR shows text")
        return None
    elif named.kind == "bytes":
        tokenizer = load_tokenizer("bytes")
    elif named.path is not None and Path(named.path).exists():
        tokenizer = load_tokenizer(named.path)
    else:
        _note(f"the tokenizer {named.path} is not there any more, so ids are shown; --tokenizer DIR shows text")
        return None
    if named is not None and named.identity != tokenizer.identity:
        _note("this is not the tokenizer that wrote the corpus (its content differs): the text may be wrong")
    return tokenizer


def _document_record(dataset: "IndexedDataset", number: int, tokenizer: "Tokenizer | None") -> dict[str, object]:
    ids = dataset.document(number).tolist()
    return {"document": number, "tokens": len(ids), "ids": ids, "text": tokenizer.decode(ids) if tokenizer else None}


def _print_document(dataset: "IndexedDataset", number: int, tokenizer: "Tokenizer | None", characters: int) -> None:
    ids = dataset.document(number)
    print(f"--- document {number}: {len(ids):,} tokens")
    if tokenizer is None:
        more = f" … and {len(ids) - _IDS_SHOWN:,} more" if len(ids) > _IDS_SHOWN else ""
        print(" ".join(map(str, ids[:_IDS_SHOWN])) + more)
        return
    text = tokenizer.decode(ids.tolist())
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


def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)
