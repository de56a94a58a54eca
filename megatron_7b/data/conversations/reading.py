"""Files of conversations, whose records are all of one format."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from megatron_7b.data.conversations.formats import Format, WeightedConversation, find_format, read_record
from megatron_7b.data.records.reading import RecordError, read_records

NAME = "conversations"


def read_conversations[T](file: Path, use: Callable[[WeightedConversation], T]) -> Iterator[tuple[int, T]]:
    """Read a JSONL file of conversations, as `read_records` does.

    Args:
        file: One record a line.
        use: What to make of each conversation; its RecordErrors are mistakes of the record.

    Yields:
        The number of the line, from 1, and what `use` made of it; nothing any more after the first mistake.

    Raises:
        DataFormatError: The file cannot be read or holds nothing; or some of its records cannot be used.
    """
    form: Format | None = None

    def of_one_format(record: dict[str, Any]) -> T:
        nonlocal form
        found = find_format(record)
        if form is not None and found != form:
            raise RecordError(f"it is of the format {found}, those before it are of the format {form}")
        form = found
        return use(read_record(record, form))

    example = '{"messages": [{"role": …}]}'
    yield from read_records(file, of_one_format, name=NAME, example=example)
