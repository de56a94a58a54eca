"""Corpora in the run folder, made from the files that users name; under names that say what they were made from."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import xxhash

from megatron_7b.data.corpus.indexed_dataset import resolve_prefix
from megatron_7b.data.records.corpus import EncodedRecord, write_records
from megatron_7b.data.samples.blend import parse_blend
from megatron_7b.errors import ConfigError, PathError
from megatron_7b.finetune.preparation import Preparation, PreparedData, Report
from megatron_7b.page_parts import format_seconds

type Encode = Callable[[Path], Iterable[EncodedRecord]]
"""What reads a file that a user names; it raises DataFormatErrors that name all its mistakes."""

_CORPUS_FILES = (".bin", ".idx")
_SECONDS_BETWEEN_REPORTS = 10.0


def encoded_corpora(
    wanted: Preparation, encode: Encode, *, kind: str, made_with: str, options: dict[str, Any]
) -> PreparedData:
    """Return `data.train` and `data.valid` with a corpus in the place of each file; make those that are missing.

    Args:
        wanted: What is prepared.
        encode: What makes records of a file.
        kind: What they are, in the plural.
        made_with: Everything beside the file that decides its content; part of the name of a corpus.
        options: The same for people, for the manifest.

    Raises:
        ConfigError: A name is neither a file nor a corpus.
        DataFormatError: Records cannot be used; all mistakes of a file are named.
        FileNotFoundError: Something is missing, and not to be made.
    """

    def corpus_of(name: str) -> str:
        file = Path(name)
        if not file.is_file() or file.suffix in _CORPUS_FILES:
            return _existing(name, kind)
        prefix = str(wanted.data_folder / f"{file.stem}-{_hash(file, made_with)}")
        if not Path(f"{prefix}.idx").is_file():
            if not wanted.make:
                raise FileNotFoundError(f"{prefix}.idx")
            records = _told(encode(file), file, kind, wanted.report)
            counts = write_records(records, prefix, wanted.tokenizer, source=file, kind=kind, options=options).counts
            wanted.report("encoded", f"{file}: {counts.documents:,} {kind}, {counts.tokens:,} tokens")
        return prefix

    data = wanted.config.data
    train, valid = (
        _with_corpora(entries, name, corpus_of)
        for entries, name in ((data.train, "data.train"), (data.valid, "data.valid"))
    )
    return PreparedData(train, valid)


def files_of(entries: Sequence[str], name: str) -> list[Path]:
    """Return the files, not the corpora, that an option names, without weights."""
    named = [Path(part.prefix) for part in parse_blend(entries, name=name)] if entries else []
    return [file for file in named if file.is_file() and file.suffix not in _CORPUS_FILES]


def _with_corpora(entries: Sequence[str], name: str, corpus_of: Callable[[str], str]) -> tuple[str, ...]:
    if not entries:
        return ()
    parts = parse_blend(entries, name=name)
    if len(parts) == 1:
        return (corpus_of(parts[0].prefix),)
    return tuple(word for part in parts for word in (str(part.weight), corpus_of(part.prefix)))


def _told(records: Iterable[EncodedRecord], file: Path, kind: str, report: Report) -> Iterator[EncodedRecord]:
    """Report how far reading a file is, now and then, if it takes long: other ranks wait for it."""
    begin = last = time.monotonic()
    total = 0
    for number, record in enumerate(records, start=1):
        yield record
        now = time.monotonic()
        if now - last >= _SECONDS_BETWEEN_REPORTS:
            last = now
            total = total or _count_lines(file)
            left = (now - begin) / number * max(0, total - number)
            report("encoding", f"{file}: {number:,} of {total:,} {kind}, {format_seconds(left)} left")


def _count_lines(file: Path) -> int:
    with file.open("rb") as stream:
        return sum(chunk.count(b"\n") for chunk in iter(lambda: stream.read(1 << 24), b""))


def _existing(name: str, kind: str) -> str:
    try:
        return resolve_prefix(name)
    except PathError as error:
        raise ConfigError(
            f"{name} is neither a file nor a corpus of {kind}", hint="name a JSONL file, a record a line"
        ) from error


def _hash(file: Path, made_with: str) -> str:
    digest = xxhash.xxh3_64(made_with.encode())
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 24):
            digest.update(chunk)
    return digest.hexdigest()[:8]
