"""The tokenizer that a corpus says it was written with, and whether it fits a run."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from megatron_7b.config.schema import DataConfig
from megatron_7b.data.blend import parse_blend
from megatron_7b.data.indexed_dataset import resolve_prefix
from megatron_7b.errors import ConfigError, DataFormatError
from megatron_7b.tokenizer import Tokenizer, load_tokenizer


@dataclass(frozen=True)
class CorpusTokenizer:
    """What the manifest of a corpus remembers of its tokenizer."""

    prefix: str
    identity: str
    kind: str
    path: str | None
    vocab_size: int
    eod_id: int | None


def read_corpus_tokenizer(prefix: str) -> CorpusTokenizer | None:
    """Return what `PREFIX.json` says, or None where there is no manifest (a corpus from Megatron-LM).

    Raises:
        DataFormatError: the corpus does not exist, or its manifest cannot be read.
    """
    resolved = resolve_prefix(prefix)
    manifest = Path(f"{resolved}.json")
    if not manifest.is_file():
        return None
    try:
        facts = json.loads(manifest.read_text(encoding="utf-8"))["tokenizer"]
        names = ("identity", "kind", "path", "vocab_size", "eod_id")
        return CorpusTokenizer(resolved, **{name: facts[name] for name in names})
    except (ValueError, KeyError, TypeError) as error:
        raise DataFormatError(f"{manifest} cannot be read: {error!r}", hint="write the corpus again") from error


def find_tokenizer(data: DataConfig, *, elsewhere: Path | None = None) -> Tokenizer | None:
    """Return the tokenizer of a run: the one named by `data.tokenizer`, else the one that its corpora name.

    Args:
        data: The data section.
        elsewhere: Where else the corpora's tokenizer may lie: that of the checkpoint a run starts from.

    Returns:
        None where nothing is named, or what is named is not there any more.

    Raises:
        ConfigError: corpora of the run were written with different tokenizers, or with another than the one named.
        DataFormatError: a corpus, manifest or tokenizer cannot be read.
    """
    corpora = [facts for facts in map(read_corpus_tokenizer, _prefixes(data)) if facts is not None]
    if data.tokenizer is not None:
        tokenizer = load_tokenizer(data.tokenizer)
        for facts in corpora:
            if facts.identity != tokenizer.identity:
                raise ConfigError(
                    f"{facts.prefix} was written with tokenizer {facts.identity} ({facts.path}), but data.tokenizer is "
                    f"{tokenizer.identity} ({data.tokenizer})",
                    hint="preprocess the text with this tokenizer, or name the corpus's own as data.tokenizer",
                )
        return tokenizer
    for facts in corpora:
        if facts.identity != corpora[0].identity:
            raise ConfigError(
                f"{corpora[0].prefix} and {facts.prefix} were written with different tokenizers: "
                f"{corpora[0].identity} and {facts.identity}",
                hint="preprocess both with the same tokenizer",
            )
    for facts in corpora:
        for place in ("bytes" if facts.kind == "bytes" else facts.path, elsewhere):
            if place is not None and (place == "bytes" or Path(place).exists()):
                tokenizer = load_tokenizer(place)
                if tokenizer.identity == facts.identity:
                    return tokenizer
    return None


def corpus_vocab_size(data: DataConfig) -> int | None:
    """Return the vocabulary size that the corpora of a run remember, or None."""
    return next((facts.vocab_size for facts in map(read_corpus_tokenizer, _prefixes(data)) if facts is not None), None)


def _prefixes(data: DataConfig) -> Iterable[str]:
    for name, entries in (("data.train", data.train), ("data.valid", data.valid)):
        if entries:
            yield from (part.prefix for part in parse_blend(entries, name=name))
