"""How commands name the records that they left out."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_7b.data.reading.records import BadRecord

_NUM_NAMED = 10


def print_bad_records(bad: "Sequence[BadRecord]", total: int | None = None) -> None:
    """Print how many records were left out, and the first of them; nothing if there are none.

    Args:
        bad: The records, or the first ones.
        total: How many there are; None if all are given.
    """
    total = len(bad) if total is None else total
    if total:
        print(f"{total:,} bad records left out, the first:")
        for record in bad[:_NUM_NAMED]:
            print(f"  {record}")
