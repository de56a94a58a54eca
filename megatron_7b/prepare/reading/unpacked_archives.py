"""WARC files whose records have no frames of their own (or in Zstandard's), decompressed from end to end."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_7b.errors import DataFormatError
from megatron_7b.prepare.extras import import_zstd
from megatron_7b.prepare.reading.warc import RECORD_MAGIC, find_record_end

_DICTIONARY_MAGIC = b"\x5d\x2a\x4d\x18"
_FRAME_MAGIC = b"\x28\xb5\x2f\xfd"


def decompress_archive(path: Path, compression: str, block_bytes: int) -> Iterator[tuple[int, bytes]]:
    """Whole records, about `block_bytes` at a time; more where one is larger.

    Args:
        path: A WARC file.
        compression: `.gz` or `.zst`.
        block_bytes: Size to aim at.

    Yields:
        Where the records begin among the decompressed bytes, and the records.

    Raises:
        DataFormatError: The file is cut or damaged.
    """
    offset, held = 0, b""
    try:
        with _open(path, compression) as stream:
            while chunk := stream.read(max(block_bytes, len(held))):
                held += chunk
                end = _find_last_end(held)
                if end:
                    yield offset, held[:end]
                    offset, held = offset + end, held[end:]
    except (EOFError, OSError, ValueError) as error:
        raise DataFormatError(f"{path} cannot be read: {error}") from error
    except Exception as error:
        if type(error).__name__ not in ("ZstdError", "IsalError"):
            raise
        raise DataFormatError(f"{path} is damaged or not a whole {compression} file: {error}") from error
    if held:
        yield offset, held


def _find_last_end(data: bytes) -> int:
    """Behind the last record that is surely whole: another one begins there. Bytes that are no record go with it."""
    last = 0
    while last < len(data):
        if data.startswith(RECORD_MAGIC, last):
            end = find_record_end(data, last)
        else:
            begin = data.find(b"\n" + RECORD_MAGIC, last) + 1
            end = begin or max(last, len(data) - len(RECORD_MAGIC))
            if end == last:
                break
        if end is None or end >= len(data):
            break
        last = end
    return last


def _open(path: Path, compression: str) -> Any:
    if compression == ".gz":
        from isal import igzip

        return igzip.open(path, "rb")
    return import_zstd().ZstdFile(path, "rb", zstd_dict=_read_dictionary(path))


def _read_dictionary(path: Path) -> Any:
    """Return the dictionary that .warc.zst files may begin with, in a frame that other readers skip.

    Source: IIPC's "WARC Zstandard compression", 1.0.
    """
    zstd = import_zstd()
    with path.open("rb") as file:
        if file.read(4) != _DICTIONARY_MAGIC:
            return None
        data = file.read(int.from_bytes(file.read(4), "little"))
    return zstd.ZstdDict(zstd.decompress(data) if data.startswith(_FRAME_MAGIC) else data)
