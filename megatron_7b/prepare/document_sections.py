"""Sections of a recipe about one document at a time: how it is read, and whether it is good enough to stay."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class ReadingSection:
    """How files become records."""

    text_key: str = "text"
    """Key of JSON objects, or column of parquet files, that holds the text."""
    text_documents: Literal["file", "paragraph", "line"] = "file"
    """What one document of plain text is."""
    html_key: bool = False
    """The text under text_key is html, to be extracted first."""
    max_bad_fraction: float = 0.01
    """With more than ten unreadable records, and more than this share of the file, the run stops."""
    shard_megabytes: float = 64.0
    """Work is cut into pieces of about this size; each gives one file per split."""


@dataclass(frozen=True, kw_only=True)
class OutputSection:
    """How documents are written."""

    compression: Literal["zstd", "none"] = "zstd"
    """Of the shards: .jsonl.zst or .jsonl."""
    provenance: bool = True
    """Write `source_file` and `source_record` (line or row from 1; of WARC, the byte) into every document."""


@dataclass(frozen=True, kw_only=True)
class ExtractionSection:
    """How html (files, and responses in WARC files) becomes text."""

    main_content: bool = True
    """Leave out navigation, headers, footers and other boiler-plate."""
    alt_texts: bool = False
    """Keep the alternative texts of pictures."""
    links: bool = False
    """Keep the targets of links."""
    max_megabytes: float = 20.0
    """Longer pages are removed unread."""


@dataclass(frozen=True, kw_only=True)
class NormalizationSection:
    """Which differences between texts mean nothing."""

    unicode: Literal["none", "nfc", "nfkc"] = "nfc"
    """Unicode's normal form; nfkc also changes what is visible."""
    control_characters: Literal["keep", "remove"] = "remove"
    """All but tab and line end; also byte order marks and zero-width spaces."""
    whitespace: Literal["keep", "tidy"] = "tidy"
    """tidy: one kind of line end, none at the end of a line, at most one empty line, none at the ends."""


@dataclass(frozen=True, kw_only=True)
class LanguageSection:
    """Which languages stay (fasttext's lid.176, on this machine)."""

    identify: bool = True
    """Write `language` and `language_score` into every document."""
    languages: tuple[str, ...] = ()
    """Codes, such as en de zh, of those to keep; empty keeps all."""
    min_score: float = 0.5
    """Below this probability of the language a document goes."""
    characters: int = 1000
    """How many from the beginning are looked at; 0 for all."""


@dataclass(frozen=True, kw_only=True)
class GopherRepetitionSection:
    """Gopher's rules against repetition; shares are of the text's characters unless something else is said."""

    max_duplicate_lines: float = 0.3
    """Share of lines that repeat an earlier one."""
    max_duplicate_line_characters: float = 0.2
    max_duplicate_paragraphs: float = 0.3
    """Share of paragraphs that repeat an earlier one."""
    max_duplicate_paragraph_characters: float = 0.2
    max_top_ngrams: tuple[float, float, float] = (0.2, 0.18, 0.16)
    """In the most frequent sequence of 2, 3 and 4 words."""
    max_duplicate_ngrams: tuple[float, float, float, float, float, float] = (0.15, 0.14, 0.13, 0.12, 0.11, 0.1)
    """In sequences of 5, 6, 7, 8, 9 and 10 words that occurred before."""


@dataclass(frozen=True, kw_only=True)
class GopherQualitySection:
    """Gopher's rules on words, symbols and lines."""

    min_words: int = 50
    max_words: int = 100_000
    min_mean_word_length: float = 3.0
    """Characters; not asked of scripts without spaces, where every character is a word."""
    max_mean_word_length: float = 10.0
    max_symbols_per_word: float = 0.1
    """Of `#` and, apart from it, of ellipses."""
    max_bullet_lines: float = 0.9
    """Share of lines that begin with a bullet or dash."""
    max_ellipsis_lines: float = 0.3
    """Share of lines that end with an ellipsis."""
    min_alphabetic_words: float = 0.8
    """Share of words with a letter in them."""
    min_stop_words: int = 2
    """How many different stop words must occur."""
    stop_words: tuple[str, ...] = ()
    """Empty takes Gopher's eight English ones, and asks only English documents for them."""


@dataclass(frozen=True, kw_only=True)
class C4Section:
    """C4's rules for web pages: they drop lines, and every page with a curly bracket, so all code."""

    min_sentences: int = 5
    """In the lines that stay."""
    min_words_per_line: int = 3
    max_word_length: int = 1000
    """Lines with a longer word go."""
    terminal_punctuation: bool = True
    """Lines that end without go."""
    drop_curly_brackets: bool = True
    """Pages with one go."""
    drop_javascript_lines: bool = True
    drop_policy_lines: bool = True
    """Lines on cookies, privacy and terms of use."""
    drop_lorem_ipsum: bool = True
    """Pages with it go."""
    remove_citations: bool = True
    """Marks such as [3] and [citation needed] are cut out of lines."""


@dataclass(frozen=True, kw_only=True)
class FineWebSection:
    """FineWeb's rules for web pages; verse, tables and lists do not pass them."""

    min_punctuated_lines: float = 0.12
    """Share of lines that end with punctuation."""
    max_short_lines: float = 0.67
    """Share of lines of at most short_line_length characters."""
    short_line_length: int = 30
    """A third of it in scripts without spaces."""
    max_duplicate_line_characters: float = 0.01
    """Share of characters in lines that repeat an earlier one."""
    max_lines_per_word: float = 0.3


@dataclass(frozen=True, kw_only=True)
class QualitySection:
    """Filters, over words that whitespace parts (a character each in scripts without spaces); none turns one off."""

    gopher_repetition: GopherRepetitionSection | None = field(default_factory=GopherRepetitionSection)
    gopher_quality: GopherQualitySection | None = field(default_factory=GopherQualitySection)
    c4: C4Section | None = None
    fineweb: FineWebSection | None = None
    bad_words: str | None = None
    """Text file with a word or phrase per line; documents with one of them go, whatever the case."""


@dataclass(frozen=True, kw_only=True)
class PiiSection:
    """Which personal data are masked, by patterns whose time is linear in the text."""

    emails: bool = True
    """E-mail addresses become email_mask."""
    ip_addresses: bool = True
    """Public IP addresses, version 4 and 6, become ip_mask."""
    phones: bool = True
    """Phone numbers in international notation (+49 …) and of North America become phone_mask."""
    accounts: bool = True
    """IBANs and card numbers whose checksum is right become account_mask."""
    email_mask: str = "<EMAIL>"
    ip_mask: str = "<IP_ADDRESS>"
    phone_mask: str = "<PHONE>"
    account_mask: str = "<ACCOUNT>"
