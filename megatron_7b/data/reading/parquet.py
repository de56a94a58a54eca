"""Parquet sources, apart from the others because importing pyarrow takes longer than a small run."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_7b.data.reading.blocks import Block, Cursor
from megatron_7b.errors import DataFormatError


def read_row_blocks(
    path: Path, span: tuple[int, int] | None, keys: Sequence[str], block_bytes: int, start: Cursor
) -> Iterator[tuple[float, Block]]:
    """Record batches of about `block_bytes`, with the columns `keys` only, from row `start.offset` on.

    Args:
        path: The file.
        span: Only the row groups whose middle is in these bytes [begin, end); None for all.
        keys: The columns.
        block_bytes: Size to aim at.
        start: The end of a block, to continue after it.

    Yields:
        How far the file has been read, as a share of its rows, and the block.

    Raises:
        DataFormatError: Not a parquet file, damaged, or without one of the columns.
    """
    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if unfit := [key for key in keys if names.count(key) != 1]:
                count = "several columns" if unfit[0] in names else "no column"
                raise DataFormatError(
                    f"{path} has {count} {', '.join(unfit)}; its columns: {', '.join(names)}",
                    hint="name the column that holds the text with --json-keys",
                )
            yield from _read_batches(path, file, span, list(keys), block_bytes, start.offset)
    except (pa.ArrowException, OSError) as error:
        raise DataFormatError(f"{path} is not a readable parquet file: {error}") from error


def _read_batches(
    path: Path, file: Any, span: tuple[int, int] | None, keys: list[str], block_bytes: int, start: int
) -> Iterator[tuple[float, Block]]:
    size = path.stat().st_size
    groups = [file.metadata.row_group(index) for index in range(file.metadata.num_row_groups)]
    num_rows = max(1, file.metadata.num_rows)
    total_bytes = sum(group.total_byte_size for group in groups)
    batch_size = max(1, min(65_536, int(block_bytes / max(1.0, total_bytes / num_rows))))
    row = bytes_before = 0
    for index, group in enumerate(groups):
        middle = size * (bytes_before + group.total_byte_size // 2) // max(1, total_bytes)
        bytes_before += group.total_byte_size
        end = row + group.num_rows
        if (span is not None and not span[0] <= middle < span[1]) or end <= start:
            row = end
            continue
        # Group by group, so that batches end where groups do: they are the same wherever reading begins.
        for batch in file.iter_batches(batch_size=batch_size, columns=keys, row_groups=[index]):
            row += batch.num_rows
            if row > start:
                block = Block("rows", path, row - batch.num_rows + 1, b"", batch, Cursor(row, row + 1))
                yield row / num_rows, block


def get_column(batch: pa.RecordBatch, key: str) -> list[object]:
    """Return the values of a column as Python objects; text that is not UTF-8 comes as bytes.

    Binary columns are text too: what some writers (older Spark, for one) make of strings.
    """
    column = batch.column(key)
    try:
        values = list(column.to_pylist())
    except UnicodeDecodeError:
        values = column.cast(pa.binary()).to_pylist()
    is_binary = isinstance(next((value for value in values if value is not None), None), bytes)
    return [_decode(value) for value in values] if is_binary else values


def _decode(value: bytes | None) -> str | bytes | None:
    try:
        return None if value is None else value.decode()
    except UnicodeDecodeError:
        return value
