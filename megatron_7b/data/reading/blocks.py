"""What a run reads of a source at a time: consecutive whole records, and where the next one begins."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

type TextDocuments = Literal["file", "paragraph", "line"]
type BlockKind = Literal["jsonl", "file", "paragraph", "line", "rows"]


class Cursor(NamedTuple):
    """Where in a source the next record begins."""

    offset: int = 0
    """Byte of the text, after decompression; of parquet, the row."""
    record: int = 1
    """Its number."""


_START = Cursor()


@dataclass(frozen=True, slots=True)
class Block:
    """Consecutive records of one source."""

    kind: BlockKind
    source: Path
    """As messages name it."""
    first_record: int
    """Number of the first record, from 1: a line of JSONL or text, a row of parquet."""
    data: bytes | memoryview
    """Raw text; empty for rows."""
    rows: Any = None
    """A pyarrow RecordBatch for kind `rows`."""
    end: Cursor = _START
