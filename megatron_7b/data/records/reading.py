"""JSONL files of records, read line by line; every mistake in them is named with file and line."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from megatron_7b.errors import DataFormatError

_PROBLEMS_SHOWN = 8


class RecordError(ValueError):
    """A record cannot be used; the text says why."""


def read_records[T](
    file: Path, use: Callable[[dict[str, Any]], T], *, name: str = "records", example: str = "{…}"
) -> Iterator[tuple[int, T]]:
    """Read a JSONL file; empty lines, CRLF and a byte order mark do no harm.

    Args:
        file: One JSON object a line.
        use: What to make of each record; its RecordErrors are mistakes of the record.
        name: What records are called in messages.
        example: What a line looks like.

    Yields:
        The number of the line, from 1, and what `use` made of it; nothing any more after the first mistake.

    Raises:
        DataFormatError: The file cannot be read or holds nothing; or some of its records cannot be used, which is told
            at the end, so that all of them are counted.
    """
    problems: list[str] = []
    num_problems, num_records = 0, 0
    for number, line in _lines(file):
        num_records += 1
        try:
            made = use(parse_record(line))
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
            "\n".join([f"{num_problems} of {num_records} {name} cannot be used:", *problems, *more]),
            hint="correct these lines, or remove them from the file",
        )
    if not num_records:
        raise DataFormatError(f"{file} holds no {name}", hint=f"a line is such as {example}")


def parse_record(line: bytes) -> dict[str, Any]:
    """Return the object of one line.

    Raises:
        RecordError: It is not UTF-8, not JSON, or not an object.
    """
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


def as_line(record: dict[str, Any]) -> str:
    """Return a record as a line of JSONL, whatever characters it has: half of a surrogate pair becomes an escape."""
    line = json.dumps(record, ensure_ascii=False)
    return (json.dumps(record) if has_half_pair(line) else line) + "\n"


def text_of(record: dict[str, Any], key: str, *, may_be_empty: bool = False) -> str:
    """Return the text of a record under a key.

    Raises:
        RecordError: There is none, it is no text, it is empty, or it holds half of a surrogate pair.
    """
    value = record.get(key)
    if not isinstance(value, str):
        found = f"no {key!r}" if value is None else f"{key!r} of type {type(value).__name__}"
        raise RecordError(
            f"it has {found}, expected a text" + ("" if key in record else f"; its keys are {sorted(record)}")
        )
    if has_half_pair(value):
        raise RecordError(f"{key!r} has half of a surrogate pair, which is no character")
    if not value.strip() and not may_be_empty:
        raise RecordError(f"{key!r} is empty")
    return value


def has_half_pair(text: str) -> bool:
    """Return whether half of a surrogate pair is in a text, which JSON can spell and no encoding has."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def _lines(file: Path) -> Iterator[tuple[int, bytes]]:
    try:
        with file.open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                content = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                if content.strip():
                    yield number, content
    except OSError as error:
        raise DataFormatError(f"{file} cannot be read: {error.strerror}") from error
