"""`megatron-7b tokenizer info`: what a tokenizer is, and whether transformers reads its folder the same way."""

import argparse
import dataclasses
import json


def add_info(actions: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    info = actions.add_parser(
        "info",
        help="show kind, vocabulary, special tokens and identity as JSON",
        description="Show what a tokenizer is, as JSON: kind, what decides its ids, vocabulary, special tokens, a "
        "sample, and whether transformers' AutoTokenizer gives the same ids for its folder.",
    )
    info.set_defaults(run=_show)
    info.add_argument("path", help="folder or file, or the word bytes")
    info.add_argument(
        "--no-transformers",
        action="store_true",
        help="leave out the comparison with AutoTokenizer, which takes seconds",
    )


def _show(arguments: argparse.Namespace) -> int:
    from megatron_7b.tokenizer import load_tokenizer
    from megatron_7b.tokenizer.description import compare_with_transformers, describe_for_people

    tokenizer = load_tokenizer(arguments.path)
    facts = dataclasses.asdict(describe_for_people(tokenizer))
    if not arguments.no_transformers:
        facts["transformers"] = compare_with_transformers(tokenizer)
    print(json.dumps(facts, indent=2, ensure_ascii=False))
    return 0
