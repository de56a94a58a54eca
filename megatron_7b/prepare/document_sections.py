"""Sections of a recipe about one document at a time: how it is read, and whether it is good enough to stay."""

from dataclasses import dataclass
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
    shard_megabytes: int = 64
    """Work is cut into pieces of about this size; each gives one file per split."""


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

    languages: tuple[str, ...] = ()
    """Two-letter codes, such as en de zh, to keep; empty keeps all and asks nothing."""
    min_score: float = 0.5
    """Below this probability of the language a document goes."""
    characters: int = 1000
    """So many from the beginning are looked at; 0 for all."""


@dataclass(frozen=True, kw_only=True)
class QualitySection:
    """Filters of the papers, over our own words: whitespace parts them, and each CJK character is one."""

    gopher_repetition: bool = True
    """Gopher's rules against repeated lines, paragraphs and n-grams."""
    gopher_quality: bool = True
    """Gopher's rules on word counts, symbols, bullets and stop words."""
    c4: bool = False
    """C4's rules on lines and pages; they drop every page with a curly bracket, and so all code."""
    fineweb: bool = True
    """FineWeb's rules on line ends, short lines and repeated characters."""


@dataclass(frozen=True, kw_only=True)
class PiiSection:
    """Which personal data are masked, by patterns whose time is linear in the text."""

    emails: bool = True
    """E-mail addresses become email_mask."""
    ip_addresses: bool = True
    """Public IP addresses, version 4 and 6, become ip_mask."""
    phones: bool = False
    """Phone numbers in international notation become phone_mask."""
    accounts: bool = True
    """IBANs and card numbers whose checksum is right become account_mask."""
    email_mask: str = "<EMAIL>"
    ip_mask: str = "<IP_ADDRESS>"
    phone_mask: str = "<PHONE>"
    account_mask: str = "<ACCOUNT>"
