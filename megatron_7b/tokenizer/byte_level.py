"""The built-in tokenizer: one token per UTF-8 byte, and three control tokens."""

import json
from collections.abc import Sequence
from pathlib import Path

from megatron_7b.tokenizer.base import SpecialRole, hash_identity, locate_bytes

MARKER_FILE = "byte_tokenizer.json"
_LAYOUT = {"kind": "bytes", "eod_id": 256, "bos_id": 257, "pad_id": 258}


def byte_characters() -> dict[int, str]:
    """Return the printable character of each byte in byte-level vocabularies.

    Bytes that are printable in Latin-1 are themselves, the others take the code points from 256 on.

    Source: the published vocabulary of GPT-2.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + index) for index, byte in enumerate(others)}


class ByteTokenizer:
    """Ids 0 to 255 are bytes; 256 ends a document, 257 begins a text, 258 pads."""

    kind = "bytes"
    path: Path | None = None
    origin = "bytes"
    identity = hash_identity("bytes", json.dumps(_LAYOUT, sort_keys=True).encode())
    vocab_size = 259
    eod_id: int | None = 256
    bos_id: int | None = 257
    pad_id: int | None = 258
    special_ids = frozenset({256, 257, 258})

    def special_id(self, role: SpecialRole) -> int | None:
        """Return the id of the one that fills up, else None."""
        return self.pad_id if role == "pad" else None

    def encode(self, text: str) -> list[int]:
        """Return the text's UTF-8 bytes."""
        return list(text.encode())

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the UTF-8 bytes of each text."""
        return [list(text.encode()) for text in texts]

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Return the text's UTF-8 bytes, and the character that each is of."""
        ids = self.encode(text)
        return ids, locate_bytes(text, [1] * len(ids))

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of the bytes; control tokens give nothing."""
        return bytes(token for token in ids if token < 256).decode(errors="replace")

    def spell(self, token: int) -> str | None:
        """Return the byte in hexadecimal digits, or what a control token is for."""
        return f"<0x{token:02X}>" if token < 256 else {256: "<eod>", 257: "<bos>", 258: "<pad>"}.get(token)

    def save(self, folder: Path) -> None:
        """Write the marker by which `load_tokenizer` knows this tokenizer."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MARKER_FILE).write_text(json.dumps(_LAYOUT, indent=2) + "\n")
