"""`PREFIX.json` beside `PREFIX.bin` and `PREFIX.idx`: what the corpus is, and how it came to be."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class TokenizerFacts:
    """What a corpus must remember of its tokenizer."""

    identity: str
    kind: str
    path: str | None
    vocab_size: int
    eod_id: int | None
    bos_id: int | None
    pad_id: int | None


@dataclass(frozen=True, kw_only=True)
class FileFacts:
    """Size in bytes and hash of a published file."""

    size: int
    xxh3_128: str


@dataclass(frozen=True, kw_only=True)
class Counts:
    """What went in and what came out; documents = good records, empty ones included."""

    documents: int
    sequences: int
    tokens: int
    empty_documents: int
    bad_records: int
    min_id: int | None
    max_id: int | None


@dataclass(frozen=True, kw_only=True)
class EngineFacts:
    """Which library encoded, and what comparing it with the reference gave."""

    name: str
    checked_texts: int = 0
    checked_characters: int = 0
    replaced_documents: int = 0


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything that `data verify` and training want to know."""

    tokenizer: TokenizerFacts
    counts: Counts
    token_bytes: int
    """Width of one id in the .bin: 2 (uint16) or 4 (int32)."""
    bin: FileFacts
    idx: FileFacts
    options: dict[str, Any]
    engine: EngineFacts
    sources: Sequence[Any]
    """`sources.SourceRecord`s in the order that they were read."""
    bad_records: Sequence[str]
    """The first few, in words."""
    command: Sequence[str]
    version: str
    format_version: int = FORMAT_VERSION

    def save(self, file: Path) -> None:
        """Write beside, then rename."""
        content = {"format_version": self.format_version} | asdict(self)
        temporary = file.with_name(file.name + ".tmp")
        temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(temporary, file)
