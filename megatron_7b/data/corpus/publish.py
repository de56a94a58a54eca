"""How a corpus gets its names: all files are complete under PREFIX.*.tmp, and are renamed one after the other.

A corpus is found by its index, so that comes last. Whatever moment a process dies at, either `publish` can be called
once more, or the files can be removed.
"""

import os
from pathlib import Path

from megatron_7b.files import flush_to_disk

PUBLISHED = (".bin", ".json", ".idx")
"""In the order of renaming."""
MASK_SUFFIX = ".mask"
"""A file that records may have besides: a number per token, such as how much it counts."""
VALUES_SUFFIX = ".values"
"""Another one: numbers per record, such as its label."""
SIDE_SUFFIXES = (MASK_SUFFIX, VALUES_SUFFIX)
_RENAMED = (".bin", *SIDE_SUFFIXES, ".json", ".idx")
_SPOOLED = (".bounds.tmp",)


def get_suffixed(prefix: str, suffix: str) -> Path:
    """PREFIX with an ending added; a dot in PREFIX is no ending."""
    return Path(prefix + suffix)


def publish(prefix: str) -> None:
    """Give all files that still have temporary names their own; files of a former corpus go first."""
    waiting = [suffix for suffix in _RENAMED if _temporary(prefix, suffix).exists()]
    # Neither index, manifest nor numbers must ever be found beside the ids of another corpus.
    former: list[str] = [suffix for suffix in (".idx", ".json") if suffix in waiting]
    if ".bin" in waiting:
        former += [suffix for suffix in SIDE_SUFFIXES if suffix not in waiting]
    for suffix in former:
        get_suffixed(prefix, suffix).unlink(missing_ok=True)
    for suffix in waiting:
        os.replace(_temporary(prefix, suffix), get_suffixed(prefix, suffix))
    for suffix in _SPOOLED:
        get_suffixed(prefix, suffix).unlink(missing_ok=True)
    flush_to_disk(Path(prefix).parent)


def remove_temporary(prefix: str) -> None:
    """Remove whatever has a temporary name."""
    for suffix in _RENAMED:
        _temporary(prefix, suffix).unlink(missing_ok=True)
    for suffix in _SPOOLED:
        get_suffixed(prefix, suffix).unlink(missing_ok=True)


def find_existing(prefix: str) -> list[Path]:
    """Return the published files that exist, without what a run left that died while it renamed."""
    if _temporary(prefix, ".idx").exists() and not get_suffixed(prefix, ".idx").exists():
        return []
    return [file for suffix in PUBLISHED if (file := get_suffixed(prefix, suffix)).exists()]


def _temporary(prefix: str, suffix: str) -> Path:
    return get_suffixed(prefix, suffix + ".tmp")
