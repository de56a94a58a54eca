"""Files of one JSON object each, as Hugging Face folders have them."""

import json
from collections.abc import Mapping
from pathlib import Path

from megatron_7b.errors import ConversionError, PathError


def read_json(file: Path) -> dict[str, object]:
    """Read a file that holds one JSON object.

    Raises:
        PathError: It is missing.
        ConversionError: It holds something else.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PathError(f"{file} is missing") from None
    except (OSError, ValueError) as error:
        raise ConversionError(f"{file} is not readable as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConversionError(f"{file} holds a {type(content).__name__}, expected a JSON object")
    return content


def write_json(file: Path, content: Mapping[str, object]) -> None:
    """Write an indented JSON object that ends with a newline."""
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
