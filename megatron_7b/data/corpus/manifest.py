"""`PREFIX.json` beside `PREFIX.bin` and `PREFIX.idx`: what the corpus is, and how it came to be."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_7b.files import replacing
from megatron_7b.runtime.strict_json import CHECKSUM, checksum
from megatron_7b.tokenizer import Tokenizer

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


def describe_tokenizer(tokenizer: Tokenizer) -> TokenizerFacts:
    """Return what a manifest remembers of a tokenizer; its path is absolute, as later runs start elsewhere."""
    return TokenizerFacts(
        identity=tokenizer.identity,
        kind=tokenizer.kind,
        path=None if tokenizer.path is None else str(tokenizer.path.absolute()),
        vocab_size=tokenizer.vocab_size,
        eod_id=tokenizer.eod_id,
        bos_id=tokenizer.bos_id,
        pad_id=tokenizer.pad_id,
    )


@dataclass(frozen=True, kw_only=True)
class FileFacts:
    """Size in bytes and hash of a published file."""

    size: int
    xxh3_128: str
    spots: str | None = None
    """`fingerprint.spot_hash`, which a start compares; None in manifests of earlier versions."""


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
    beside: dict[str, FileFacts] = field(default_factory=dict)
    """Of the further files of a corpus of records, by ending."""
    options: dict[str, Any]
    engine: EngineFacts
    sources: Sequence[Any]
    """`sources.SourceRecord`s in the order that they were read."""
    bad_records: Sequence[str]
    """The first few, in words."""
    command: Sequence[str]
    version: str
    job_hash: str | None = None
    """Of all that decided the content: by it the same command knows its own work. None if no run wrote this."""
    format_version: int = FORMAT_VERSION

    def write(self, file: Path) -> None:
        """Write a file, on the disk when this returns."""
        content = {"format_version": self.format_version} | asdict(self)
        content[CHECKSUM] = checksum(content)
        # A path that is no UTF-8 comes as lone surrogates: as an escape, JSON can hold them.
        with file.open("w", encoding="utf-8", errors="backslashreplace") as stream:
            stream.write(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
            stream.flush()
            os.fsync(stream.fileno())

    def save(self, file: Path) -> None:
        """Write beside, then rename."""
        with replacing(file) as beside:
            self.write(beside)
