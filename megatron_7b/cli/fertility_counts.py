"""How many tokens a tokenizer spends on the words of a text, by language or file."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from megatron_7b.data.reading.records import BadRecord, parse_block
from megatron_7b.data.reading.sources import Source
from megatron_7b.prepare.document_sections import LanguageSection
from megatron_7b.prepare.rules.language import LanguageFilter
from megatron_7b.prepare.rules.words import split_words
from megatron_7b.tokenizer import Tokenizer

_BLOCK_BYTES = 1 << 20


@dataclass(slots=True)
class TextCount:
    """Texts of one language or file, as they are before any tokenizer."""

    documents: int = 0
    words: int = 0
    """Whitespace parts them; in scripts without spaces each character is one."""
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


def measure_fertility(
    sources: Sequence[Source],
    tokenizers: Sequence[Tokenizer],
    *,
    key: str,
    by: str,
    share: float,
    on_block: Callable[[int, int], None],
    bad: list[BadRecord],
) -> dict[str, Fertility]:
    """Count words and tokens.

    Args:
        sources: Files of text.
        tokenizers: What is compared.
        key: Key of a record that holds the text.
        by: `file`; `language`, as lid.176 finds it; or a key of the records whose value groups them.
        share: Of the text, evenly spread over it; 0 to 1.
        on_block: Told documents and tokens so far.
        bad: Takes the records that are left out.

    Returns:
        Counts by the name of the group, the one with the most bytes first.

    Raises:
        ConfigError: Languages are asked for and their model is not installed.
        DataFormatError: A file is damaged as a whole.
    """
    name_language = LanguageFilter(LanguageSection()).identify if by == "language" else None
    groups: dict[str, Fertility] = {}
    documents = tokens = 0
    for source, names, texts in _read_texts(sources, key, None if by in ("file", "language") else by, share, bad):
        if name_language is not None:
            names = [name_language(text)[0] for text in texts]
        by_name: dict[str, list[str]] = {}
        for name, text in zip(names or [str(source.path)] * len(texts), texts, strict=True):
            by_name.setdefault(name, []).append(text)
        for name, some in by_name.items():
            group = groups.setdefault(name, Fertility(tokens=[TokenCount() for _ in tokenizers]))
            tokens += _count(group, some, tokenizers)
        documents += len(texts)
        on_block(documents, tokens)
    return dict(sorted(groups.items(), key=lambda item: (-item[1].text.bytes, item[0])))


def _read_texts(
    sources: Sequence[Source], key: str, group_key: str | None, share: float, bad: list[BadRecord]
) -> Iterator[tuple[Source, list[str], list[str]]]:
    """Group names (none without a group key) and texts of every block, or of evenly spread ones."""
    keys = [key] if group_key is None else [key, group_key]
    # Small inputs in small blocks, so that a sample is spread there too.
    block_bytes = min(_BLOCK_BYTES, max(1 << 14, sum(source.size for source in sources) // 64))
    owed = 1.0 - share
    for source in sources:
        for block in source.read_blocks(keys, "file", block_bytes):
            owed += share
            if owed >= 1.0:
                owed -= 1.0
                parsed = parse_block(block, keys)
                bad += parsed.bad
                yield source, parsed.texts[1] if len(parsed.texts) > 1 else [], parsed.texts[0]


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
