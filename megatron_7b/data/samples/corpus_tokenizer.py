"""The tokenizer that a corpus was written with, and whether it fits a run."""

from collections.abc import Sequence
from pathlib import Path

from megatron_7b.config.schema import DataConfig
from megatron_7b.data.corpus.indexed_dataset import resolve_prefix
from megatron_7b.data.corpus.manifest import TokenizerFacts
from megatron_7b.data.corpus.manifest_reader import load_tokenizer_facts
from megatron_7b.data.samples.blend import parse_blend
from megatron_7b.errors import ConfigError
from megatron_7b.tokenizer import Tokenizer, load_tokenizer


def read_corpus_tokenizer(prefix: str) -> tuple[str, TokenizerFacts] | None:
    """Return a corpus's full prefix and what its manifest says, or None if it has none (one from Megatron-LM).

    Raises:
        DataFormatError: The corpus does not exist, or its manifest cannot be read.
    """
    resolved = resolve_prefix(prefix)
    facts = load_tokenizer_facts(resolved)
    return None if facts is None else (resolved, facts)


def find_tokenizer(data: DataConfig, *, of_model: Path | None = None) -> Tokenizer | None:
    """Return the tokenizer of a run: the model's where that exists already, else `data.tokenizer`, else the corpora's.

    Args:
        data: The data section.
        of_model: What the weights at hand were trained with: kept in the run folder, or carried by the checkpoint that
            a run starts from.

    Returns:
        None where nothing is named, or what is named is not there any more.

    Raises:
        ConfigError: Corpora of the run were written with different tokenizers, or with another than the one named or
            the model's.
        DataFormatError: A corpus, manifest or tokenizer cannot be read.
    """
    corpora = _corpora(data)
    _check_agreement(corpora)
    tokenizer = None
    if data.tokenizer is not None:
        tokenizer = load_tokenizer(data.tokenizer)
        _check_corpora(corpora, tokenizer, f"data.tokenizer is {tokenizer.identity} ({data.tokenizer})")
    if of_model is not None:
        trained_with = load_tokenizer(of_model)
        says = f"the model was trained with {trained_with.identity} ({of_model})"
        _check_corpora(corpora, trained_with, says)
        if tokenizer is not None and tokenizer.identity != trained_with.identity:
            raise ConfigError(
                f"data.tokenizer is {tokenizer.identity} ({data.tokenizer}), but {says}",
                hint="leave data.tokenizer out",
            )
        return trained_with
    return tokenizer or _load_what_is_named(corpora)


def check_agreement(data: DataConfig) -> None:
    """Check that one tokenizer wrote all corpora of a run, without loading it.

    Raises:
        ConfigError: Two of them name different ones.
        DataFormatError: A manifest cannot be read.
    """
    _check_agreement(_corpora(data))


def _check_agreement(corpora: Sequence[tuple[str, TokenizerFacts]]) -> None:
    for prefix, facts in corpora:
        first_prefix, first = corpora[0]
        if facts.identity != first.identity:
            raise ConfigError(
                f"{first_prefix} and {prefix} were written with different tokenizers: "
                f"{first.identity} and {facts.identity}",
                hint="preprocess both with the same tokenizer",
            )


def _check_corpora(corpora: list[tuple[str, TokenizerFacts]], tokenizer: Tokenizer, says: str) -> None:
    for prefix, facts in corpora:
        if facts.identity != tokenizer.identity:
            raise ConfigError(
                f"{prefix} was written with tokenizer {facts.identity} ({facts.path}), but {says}",
                hint="preprocess the text with that tokenizer, or name another corpus",
            )


def _load_what_is_named(corpora: list[tuple[str, TokenizerFacts]]) -> Tokenizer | None:
    for _, facts in corpora:
        place = "bytes" if facts.kind == "bytes" else facts.path
        if place is not None and (place == "bytes" or Path(place).exists()):
            tokenizer = load_tokenizer(place)
            if tokenizer.identity == facts.identity:
                return tokenizer
    return None


def corpus_vocab_size(data: DataConfig) -> int | None:
    """Return the vocabulary size that the corpora of a run remember, or None."""
    return next((facts.vocab_size for _, facts in _corpora(data)), None)


def _corpora(data: DataConfig) -> list[tuple[str, TokenizerFacts]]:
    """Return those of a run that have a manifest."""
    blends = (("data.train", data.train), ("data.valid", data.valid))
    prefixes = [part.prefix for name, entries in blends if entries for part in parse_blend(entries, name=name)]
    return [corpus for corpus in map(read_corpus_tokenizer, prefixes) if corpus is not None]
