"""Files of conversations, read line by line; every mistake in them is named with file and line."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from megatron_7b.data.conversations.formats import (
    Format,
    RecordError,
    WeightedConversation,
    find_format,
    read_record,
)
from megatron_7b.errors import DataFormatError

_PROBLEMS_SHOWN = 8


def read_conversations[T](file: Path, use: Callable[[WeightedConversation], T]) -> Iterator[tuple[int, T]]:
    """Read a JSONL file whose records are all of one format; empty lines, CRLF and a byte order mark do no harm.

    Args:
        file: One record a line.
        use: What to make of each conversation; its RecordErrors are mistakes of the record.

    Yields:
        The number of the line, from 1, and what `use` made of it; nothing any more after the first mistake.

    Raises:
        DataFormatError: The file cannot be read or holds nothing; or some of its records cannot be used, which is told
            at the end, so that all of them are counted.
    """
    problems: list[str] = []
    num_problems, num_records = 0, 0
    form: Format | None = None
    for number, line in _lines(file):
        num_records += 1
        try:
            record = _parse(line)
            found = find_format(record)
            if form is not None and found != form:
                raise RecordError(f"it is of the format {found}, those before it are of the format {form}")
            form = found
            made = use(read_record(record, form))
        except RecordError as error:
            num_problems += 1
            if len(problems) < _PROBLEMS_SHOWN:
                problems.append(f"  {file}:{number}: {error}")
            continue
        if not num_problems:
            yield number, made
    if num_problems:
        more = [f"  … and {num_problems - len(problems)} more"] if num_problems > len(problems) else []
        raise DataFormatError(
            "\n".join([f"{num_problems} of {num_records} conversations cannot be used:", *problems, *more]),
            hint="correct these lines, or remove them from the file",
        )
    if not num_records:
        raise DataFormatError(f"{file} holds no conversations", hint='a line is such as {"messages": [{"role": …}]}')


def _lines(file: Path) -> Iterator[tuple[int, bytes]]:
    try:
        with file.open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                content = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                if content.strip():
                    yield number, content
    except OSError as error:
        raise DataFormatError(f"{file} cannot be read: {error.strerror}") from error


def _parse(line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise RecordError(f"byte {error.start + 1} is not UTF-8") from None
    except json.JSONDecodeError as error:
        raise RecordError(f"it is not JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise RecordError("it is nested too deeply") from None
    if not isinstance(record, dict):
        raise RecordError(f"it is a JSON {type(record).__name__}, expected an object")
    return record
