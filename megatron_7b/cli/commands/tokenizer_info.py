"""`megatron-7b tokenizer info`: what a tokenizer is, and whether transformers reads its folder the same way."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_7b.errors import DataFormatError

if TYPE_CHECKING:
    from megatron_7b.tokenizer import Tokenizer

_MOST_SPECIAL = 40
"""Special tokens that are listed; some vocabularies reserve thousands."""
_SAMPLE = "Hello world, it's 2024: naïve 東京 🙂\n"


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

    tokenizer = load_tokenizer(arguments.path)
    special = sorted(tokenizer.special_ids)
    facts = {
        "kind": tokenizer.kind,
        "path": None if tokenizer.path is None else str(tokenizer.path),
        "identity": tokenizer.identity,
        "ids_decided_by": tokenizer.origin,
        "vocab_size": tokenizer.vocab_size,
        "eod": _describe(tokenizer, tokenizer.eod_id),
        "bos": _describe(tokenizer, tokenizer.bos_id),
        "pad": _describe(tokenizer, tokenizer.pad_id),
        "num_special": len(special),
        "special": {str(token): tokenizer.spell(token) for token in special[:_MOST_SPECIAL]},
        "chat_template": _has_template(tokenizer),
        "sample": _describe_sample(tokenizer),
    }
    if not arguments.no_transformers:
        facts["transformers"] = _compare(tokenizer)
    print(json.dumps(facts, indent=2, ensure_ascii=False))
    return 0


def _describe(tokenizer: "Tokenizer", token: int | None) -> dict[str, object] | None:
    return None if token is None else {"id": token, "text": tokenizer.spell(token)}


def _describe_sample(tokenizer: "Tokenizer") -> dict[str, object]:
    ids = tokenizer.encode(_SAMPLE)
    return {
        "text": _SAMPLE,
        "ids": ids,
        "tokens": [tokenizer.spell(token) for token in ids],
        "decoded": tokenizer.decode(ids),
    }


def _has_template(tokenizer: "Tokenizer") -> bool:
    """Whether the folder brings a chat template, in a file of its own or in its settings."""
    from megatron_7b.tokenizer.definition import CONFIG_FILE, TEMPLATE_FILES, read_object_if_there

    if tokenizer.path is None or tokenizer.kind == "bytes":
        return False
    folder = tokenizer.path if tokenizer.path.is_dir() else tokenizer.path.parent
    files = (file for pattern in TEMPLATE_FILES for file in folder.glob(pattern))
    return next(files, None) is not None or bool(read_object_if_there(folder / CONFIG_FILE).get("chat_template"))


def _compare(tokenizer: "Tokenizer") -> str:
    """What AutoTokenizer makes of the folder, in words."""
    from megatron_7b.tokenizer.agreement import why_ids_differ

    if tokenizer.path is None or tokenizer.kind == "bytes":
        return "not compared: no files of transformers' make it up"
    path: Path = tokenizer.path
    try:
        difference = why_ids_differ(tokenizer, path if path.is_dir() else path.parent)
    except DataFormatError as error:
        return f"not compared: {error.args[0]}"
    return "AutoTokenizer gives the same ids for all probes" if difference is None else f"other ids: {difference}"
