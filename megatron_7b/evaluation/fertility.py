"""How many tokens a tokenizer spends on the words of a text, by language or file."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_7b.data.reading.progress import OpenProgress, tell_nobody
from megatron_7b.data.reading.records import BadRecord
from megatron_7b.data.reading.sources import find_sources
from megatron_7b.data.reading.spread import SpreadReader
from megatron_7b.prepare.document_sections import LanguageSection
from megatron_7b.prepare.rules.language import LanguageFilter
from megatron_7b.prepare.rules.words import split_words
from megatron_7b.tokenizer import Tokenizer


@dataclass(slots=True)
class TextCount:
    """Texts of one language or file, as they are before any tokenizer."""

    documents: int = 0
    words: int = 0
    """Separated by whitespace; in scripts without spaces each character is one."""
    characters: int = 0
    bytes: int = 0
    """As UTF-8."""


@dataclass(slots=True)
class TokenCount:
    """What one tokenizer makes of these texts."""

    tokens: int = 0
    altered: int = 0
    """Documents that do not come back as they were when their tokens are decoded."""


@dataclass(slots=True)
class Fertility:
    """Counts of one language or file, and of each tokenizer on it."""

    text: TextCount = field(default_factory=TextCount)
    tokens: list[TokenCount] = field(default_factory=list)
    """In the order of the tokenizers."""


@dataclass(frozen=True)
class FertilityReport:
    """What tokenizers spend on some files.

    Attributes:
        groups: Counts by the name of the group, the one with the most bytes first.
        bad: Records that were left out.
    """

    groups: dict[str, Fertility]
    bad: list[BadRecord]


def measure_fertility(
    inputs: Sequence[str | Path],
    tokenizers: Sequence[Tokenizer],
    *,
    key: str = "text",
    by: str = "file",
    sample_mb: float | None = None,
    open_progress: OpenProgress = tell_nobody,
) -> FertilityReport:
    """Count the words of files and the tokens that tokenizers make of them, group by group.

    Args:
        inputs: Files, globs or folders of text, as `preprocess` reads them.
        tokenizers: What is compared.
        key: Key of a record that holds the text.
        by: `file`; `language`, as lid.176 finds it; or a key of the records whose value groups them.
        sample_mb: Look at this much of the input [MB], evenly spread; None looks at all of it.
        open_progress: Shows how far it is.

    Raises:
        ConfigError: Languages are asked for and their model is not installed, or there is no such input.
        DataFormatError: A file is damaged as a whole.
    """
    name_language = LanguageFilter(LanguageSection()).identify if by == "language" else None
    reader = SpreadReader(find_sources([str(one) for one in inputs]), sample_mb)
    keys = [key] if by in ("file", "language") else [key, by]
    report = FertilityReport({}, [])
    documents = tokens = 0
    with open_progress(max(1, reader.total_bytes)) as progress:
        for source, block in reader.read_blocks(keys):
            texts = block.texts[0]
            if name_language is not None:
                names = [name_language(text)[0] for text in texts]
            else:
                names = block.texts[1] if len(keys) > 1 else [str(source.path)] * len(texts)
            report.bad.extend(block.bad)
            documents += len(texts)
            tokens += _count_groups(report.groups, names, texts, tokenizers)
            if progress is not None:
                progress.update(reader.bytes_read, documents, tokens)
    by_size = sorted(report.groups.items(), key=lambda item: (-item[1].text.bytes, item[0]))
    return FertilityReport(dict(by_size), report.bad)


def _count_groups(
    groups: dict[str, Fertility], names: Sequence[str], texts: Sequence[str], tokenizers: Sequence[Tokenizer]
) -> int:
    """Add texts to the groups of their names; return the tokens that all tokenizers together made of them."""
    by_name: dict[str, list[str]] = {}
    for name, text in zip(names, texts, strict=True):
        by_name.setdefault(name, []).append(text)
    return sum(
        _count(groups.setdefault(name, Fertility(tokens=[TokenCount() for _ in tokenizers])), some, tokenizers)
        for name, some in by_name.items()
    )


def _count(group: Fertility, texts: Sequence[str], tokenizers: Sequence[Tokenizer]) -> int:
    """Add texts to a group; return the tokens that all tokenizers together made of them."""
    group.text.documents += len(texts)
    group.text.words += sum(len(split_words(text)) for text in texts)
    group.text.characters += sum(map(len, texts))
    group.text.bytes += sum(len(text.encode()) for text in texts)
    made = 0
    for tokenizer, count in zip(tokenizers, group.tokens, strict=True):
        encoded = tokenizer.encode_batch(texts)
        count.tokens += sum(map(len, encoded))
        count.altered += sum(tokenizer.decode(ids) != text for ids, text in zip(encoded, texts, strict=True))
        made += sum(map(len, encoded))
    return made
