"""Bodies of HTTP responses as servers sent them: in chunks, compressed, or neither, whatever their headers say.

Many archives keep a body decoded beside headers of how it came. So what is not in the encoding that a header names, and
reads as a text, is taken as it is.
"""

import re
import zlib
from collections.abc import Callable, Mapping

from megatron_7b.prepare.extras import import_extra, import_zstd

_CHUNK_SIZE = re.compile(rb"[ \t]*([0-9A-Fa-f]{1,8})[ \t]*(?:;[^\r\n]*)?\r?\n")
_TEXT_BYTES = 1000


def decode_body(body: bytes, headers: Mapping[str, str]) -> bytes:
    """Return a body without its transfer and content encodings.

    Args:
        body: As it was archived.
        headers: Of the response.

    Raises:
        ValueError: It is cut, damaged, or in an encoding that is not known here.
    """
    names = {name.lower(): value.lower() for name, value in headers.items()}
    listed = f"{names.get('content-encoding', '')},{names.get('transfer-encoding', '')}".split(",")
    for encoding in [name.strip() for name in reversed(listed)]:
        if encoding not in ("", "identity", "none", "utf-8"):
            body = _decode(body, encoding)
    return body


def _decode(body: bytes, encoding: str) -> bytes:
    decoder = _DECODERS.get(encoding)
    try:
        if decoder is None:
            raise ValueError(f"unknown encoding {encoding!r}")
        return decoder(body)
    except Exception as error:
        if _is_text(body):
            return body
        raise ValueError(f"{encoding}: {error}") from error


def _is_text(body: bytes) -> bool:
    """Return whether it begins as a text does: without control characters but for the usual ones."""
    head = body[:_TEXT_BYTES]
    return not head.translate(None, delete=_USUAL)


_USUAL = bytes([*b"\t\n\f\r", *range(0x20, 0x7F), *range(0x80, 0x100)])


def _join_chunks(body: bytes) -> bytes:
    chunks: list[bytes] = []
    position = 0
    while True:
        size = _CHUNK_SIZE.match(body, position)
        if size is None:
            raise ValueError(f"no chunk at byte {position}")
        length = int(size.group(1), 16)
        if length == 0:
            return b"".join(chunks)
        position = size.end() + length
        if position > len(body):
            raise ValueError("cut off within a chunk")
        chunks.append(body[size.end() : position])
        position += 2 if body[position : position + 2] == b"\r\n" else 1


def _inflate(body: bytes) -> bytes:
    """With the header that the standard wants, or without, as some servers send it."""
    try:
        return zlib.decompress(body)
    except zlib.error:
        return zlib.decompress(body, -zlib.MAX_WBITS)


def _gunzip(body: bytes) -> bytes:
    import gzip

    return gzip.decompress(body)


_DECODERS: Mapping[str, Callable[[bytes], bytes]] = {
    "chunked": _join_chunks,
    "gzip": _gunzip,
    "x-gzip": _gunzip,
    "deflate": _inflate,
    "br": lambda body: bytes(import_extra("brotli", "reading WARC files").decompress(body)),
    "zstd": lambda body: bytes(import_zstd().decompress(body)),
}
