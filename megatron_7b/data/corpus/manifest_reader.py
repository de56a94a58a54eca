"""Reading `PREFIX.json` back, strictly: what `manifest` writes, or a DataFormatError that says where."""

from pathlib import Path
from typing import Any

import numpy as np

from megatron_7b.data.corpus.manifest import FORMAT_VERSION, Manifest, TokenizerFacts
from megatron_7b.errors import DataFormatError
from megatron_7b.runtime.strict_json import CHECKSUM, MismatchError, build, checksum, parse_object

_TOKEN_TYPES: dict[int, np.dtype[Any]] = {2: np.dtype(np.uint16), 4: np.dtype(np.int32)}


def manifest_path(prefix: str) -> Path:
    """Return the path of the manifest of a corpus; a dot in PREFIX is no ending."""
    return Path(f"{prefix}.json")


def load_manifest(prefix: str) -> Manifest | None:
    """Return the manifest of a corpus, every field of the right type; None if there is none (one from Megatron-LM).

    Args:
        prefix: As `resolve_prefix` returns it.

    Raises:
        DataFormatError: It is not JSON, not a manifest, or of another format version.
    """
    content = _read(prefix)
    if content is None:
        return None
    file = manifest_path(prefix)
    try:
        manifest = build(Manifest, content, "manifest")
    except MismatchError as error:
        raise DataFormatError(f"{file} is not a manifest: {error}", hint=_HINT) from None
    if manifest.token_bytes not in _TOKEN_TYPES:
        raise DataFormatError(f"{file}: token_bytes is {manifest.token_bytes}, expected 2 or 4", hint=_HINT)
    return manifest


def find_edit(prefix: str) -> tuple[str, str] | None:
    """Return the checksum in a manifest and that of its content if they differ: something was changed in it.

    Args:
        prefix: As `resolve_prefix` returns it, of a corpus whose manifest can be loaded.
    """
    content = _read(prefix)
    if content is None or CHECKSUM not in content:  # none, or that of an earlier version
        return None
    expected, found = str(content[CHECKSUM]), checksum(content)
    return None if expected == found else (expected, found)


def load_tokenizer_facts(prefix: str) -> TokenizerFacts | None:
    """Return what the manifest of a corpus says of its tokenizer, whatever else it holds; None if there is none.

    Args:
        prefix: As `resolve_prefix` returns it.

    Raises:
        DataFormatError: It is not JSON, names no tokenizer, or is of another format version.
    """
    content = _read(prefix)
    if content is None:
        return None
    try:
        return build(TokenizerFacts, content.get("tokenizer"), "tokenizer")
    except MismatchError as error:
        raise DataFormatError(f"{manifest_path(prefix)} is not a manifest: {error}", hint=_HINT) from None


def token_dtype(manifest: Manifest) -> np.dtype[Any]:
    """Type of the ids in the .bin."""
    return _TOKEN_TYPES[manifest.token_bytes]


_HINT = "`megatron-7b data adopt PREFIX --tokenizer DIR --overwrite` writes a new one"


def _read(prefix: str) -> dict[str, Any] | None:
    file = manifest_path(prefix)
    try:
        content = parse_object(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise DataFormatError(f"{file} cannot be read: {error}", hint=_HINT) from error
    if content.get("format_version", FORMAT_VERSION) != FORMAT_VERSION:
        raise DataFormatError(
            f"{file} has format version {content['format_version']!r}, expected {FORMAT_VERSION}",
            hint="it was written by another version of megatron-7b",
        )
    return content
