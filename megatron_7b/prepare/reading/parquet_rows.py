"""Rows of parquet files with all their columns, by row groups."""

from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_7b.data.reading.parquet import get_column
from megatron_7b.errors import DataFormatError

_ROWS = 1000
_BUFFER_BYTES = 1 << 20


def read_group_sizes(path: str) -> list[tuple[int, int]]:
    """Return the rows and compressed bytes of each row group.

    Raises:
        DataFormatError: Not a parquet file, or a damaged one.
    """
    try:
        with pq.ParquetFile(path) as file:
            groups = [file.metadata.row_group(index) for index in range(file.metadata.num_row_groups)]
            return [
                (group.num_rows, sum(group.column(index).total_compressed_size for index in range(group.num_columns)))
                for group in groups
            ]
    except (pa.ArrowException, OSError) as error:
        raise DataFormatError(f"{path} is not a readable parquet file: {error}") from error


def read_rows(
    path: str, text_key: str, start: int, end: int | None, rows: tuple[int, int] | None = None
) -> Iterator[dict[str, object]]:
    """Yield the rows of some row groups, or only those from one row of them to before another.

    Text that is not UTF-8 comes as bytes.

    Raises:
        DataFormatError: Not a parquet file, damaged, or without the column.
    """
    try:
        # Buffered page by page: a row group may be as large as the file.
        with pq.ParquetFile(path, buffer_size=_BUFFER_BYTES, pre_buffer=False) as file:
            names = file.schema_arrow.names
            if text_key not in names:
                raise DataFormatError(
                    f"{path} has no column {text_key}; its columns: {', '.join(names)}",
                    hint="name the column that holds the text with --reading.text-key",
                )
            groups = list(range(file.metadata.num_row_groups))[start:end]
            for batch in _cut_batches(file.iter_batches(batch_size=_ROWS, row_groups=groups), rows):
                columns = [get_column(batch, name) for name in names]
                for values in zip(*columns, strict=True):
                    yield dict(zip(names, values, strict=True))
    except (pa.ArrowException, OSError) as error:
        raise DataFormatError(f"{path} is not a readable parquet file: {error}") from error


def _cut_batches(batches: Iterator[pa.RecordBatch], rows: tuple[int, int] | None) -> Iterator[pa.RecordBatch]:
    if rows is None:
        yield from batches
        return
    first = 0
    for batch in batches:
        begin, end = max(rows[0] - first, 0), min(rows[1] - first, batch.num_rows)
        if begin < end:
            yield batch.slice(begin, end - begin)
        first += batch.num_rows
        if first >= rows[1]:
            return
