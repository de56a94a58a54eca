"""Tables of text: columns of the width of their widest cell."""

from collections.abc import Iterator, Sequence


def align(rows: Sequence[Sequence[str]], *, num_left: int) -> Iterator[str]:
    """Yield the rows as lines.

    Args:
        rows: Equally many cells each; the first row may be the heads.
        num_left: Columns that are aligned to the left; the others are to the right.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (
            cell.ljust(width) if column < num_left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        yield "  ".join(cells).rstrip()
