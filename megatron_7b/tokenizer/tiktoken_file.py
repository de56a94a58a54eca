"""tiktoken rank files: `base64(token) rank` per line.

The file holds neither the splitting pattern nor the special tokens. They come from a JSON file beside it,
`{"pattern": …, "special_tokens": {"<|endoftext|>": 100257}, "eod_token": …, "bos_token": …, "pad_token": …}`, named
like the rank file with `.json` added; without it, from what its name or size says; else from defaults.
"""

import base64
import binascii
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import tiktoken

from megatron_7b.errors import DataFormatError
from megatron_7b.tokenizer.base import SpecialRole, find_usual_name, hash_identity, locate_bytes

RANKS_FILE = "tokenizer.tiktoken"
_SIDECAR_KEYS = {"pattern", "special_tokens", "eod_token", "bos_token", "pad_token"}

GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CL100K_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class TiktokenSettings:
    """What a rank file leaves unsaid."""

    pattern: str
    special_tokens: dict[str, int] = field(default_factory=dict)
    eod_token: str | None = None
    bos_token: str | None = None
    pad_token: str | None = None


class TiktokenTokenizer:
    """A rank file with its settings. Text that looks like a special token is ordinary text."""

    kind = "tiktoken"

    def __init__(self, path: Path) -> None:
        self.path: Path | None = path
        self.origin = "the tiktoken ranks and their settings"
        self._content = path.read_bytes()
        ranks = parse_ranks(self._content, path)
        self.settings = _load_settings(path, len(ranks))
        self._check(ranks)
        try:
            self._encoding = tiktoken.Encoding(
                path.stem,
                pat_str=self.settings.pattern,
                mergeable_ranks=ranks,
                special_tokens=self.settings.special_tokens,
            )
        except Exception as error:  # a wrong pattern surfaces as the Rust library's own exception
            raise DataFormatError(f"{path} cannot be used with pattern {self.settings.pattern!r}: {error}") from error
        self.vocab_size = 1 + max(*ranks.values(), *self.settings.special_tokens.values(), 0)
        self.special_ids = frozenset(self.settings.special_tokens.values())
        self.eod_id = self._role(self.settings.eod_token)
        self.bos_id = self._role(self.settings.bos_token)
        self.pad_id = self._role(self.settings.pad_token)

    @cached_property
    def identity(self) -> str:
        """Hash of the ranks and the settings, wherever the settings came from."""
        return hash_identity(self.kind, self._content, json.dumps(asdict(self.settings), sort_keys=True).encode())

    def special_id(self, role: SpecialRole) -> int | None:
        """Return the special token with a usual name."""
        if role == "pad" and self.pad_id is not None:
            return self.pad_id
        return find_usual_name(role, self.settings.special_tokens)

    def encode(self, text: str) -> list[int]:
        """Return the library's ids of the text taken as ordinary text."""
        ids: list[int] = self._encoding.encode_ordinary(text)
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the same for many texts, on threads."""
        ids: list[list[int]] = self._encoding.encode_ordinary_batch(list(texts))
        return ids

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Return the same, with the characters that the tokens' bytes belong to."""
        ids = self.encode(text)
        return ids, locate_bytes(text, [len(self.token_bytes(token)) for token in ids])

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text with special tokens written out."""
        text: str = self._encoding.decode(list(ids))
        return text

    def token_bytes(self, token: int) -> bytes:
        """Return the bytes of one token; empty for an id without a token."""
        try:
            content: bytes = self._encoding.decode_single_token_bytes(token)
        except KeyError:
            return b""
        return content

    def spell(self, token: int) -> str | None:
        """Return the token's text; bytes that are not UTF-8 become U+FFFD."""
        return self.token_bytes(token).decode(errors="replace") or None

    def save(self, folder: Path) -> None:
        """Write the rank file, and beside it the settings spelled out."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / RANKS_FILE).write_bytes(self._content)
        sidecar = json.dumps(asdict(self.settings), indent=2, ensure_ascii=False) + "\n"
        _get_sidecar(folder / RANKS_FILE).write_text(sidecar, encoding="utf-8")

    def _role(self, content: str | None) -> int | None:
        return None if content is None else self.settings.special_tokens[content]

    def _check(self, ranks: dict[bytes, int]) -> None:
        settings = self.settings
        for role in ("eod_token", "bos_token", "pad_token"):
            content = getattr(settings, role)
            if content is not None and content not in settings.special_tokens:
                raise DataFormatError(
                    f"{self.path}: {role} is {content!r}, expected one of the special tokens "
                    f"{sorted(settings.special_tokens)}"
                )
        taken = set(ranks.values())
        clashes = {content: token for content, token in settings.special_tokens.items() if token in taken}
        if clashes:
            raise DataFormatError(f"{self.path}: special tokens {clashes} have ids that the ranks already use")


def parse_ranks(content: bytes, path: Path) -> dict[bytes, int]:
    """Read `base64 rank` lines.

    Raises:
        DataFormatError: A line has another form; names file and line.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(content.splitlines(), start=1):
        if not line:
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise DataFormatError(f"{path}:{number} is not a tiktoken rank line: {line[:60]!r}") from error
    if not all(bytes([value]) in ranks for value in range(256)):
        raise DataFormatError(f"{path} has no rank for some single bytes, so it cannot encode every text")
    return ranks


def _get_sidecar(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def _load_settings(path: Path, num_ranks: int) -> TiktokenSettings:
    sidecar = _get_sidecar(path)
    if sidecar.is_file():
        return _read_sidecar(sidecar)
    name = path.stem
    if name in ("r50k_base", "gpt2"):
        return _with_end_of_text(GPT2_PATTERN, 50256)
    if name == "cl100k_base":
        special = {"<|endoftext|>": 100257, "<|fim_prefix|>": 100258, "<|fim_middle|>": 100259}
        special |= {"<|fim_suffix|>": 100260, "<|endofprompt|>": 100276}
        return TiktokenSettings(CL100K_PATTERN, special, "<|endoftext|>", "<|endoftext|>")
    if num_ranks == 128_000:
        return _llama3_settings()
    return _with_end_of_text(CL100K_PATTERN, num_ranks)


def _with_end_of_text(pattern: str, token: int) -> TiktokenSettings:
    return TiktokenSettings(pattern, {"<|endoftext|>": token}, "<|endoftext|>", "<|endoftext|>")


def _llama3_settings() -> TiktokenSettings:
    """Return the 256 control tokens after the 128,000 ranks of Llama 3. Source: the model's published tokenizer."""
    names = ["<|begin_of_text|>", "<|end_of_text|>"]
    names += [f"<|reserved_special_token_{index}|>" for index in range(4)]
    names += ["<|start_header_id|>", "<|end_header_id|>", "<|reserved_special_token_4|>", "<|eot_id|>"]
    names += [f"<|reserved_special_token_{index}|>" for index in range(5, 251)]
    special = {name: 128_000 + index for index, name in enumerate(names)}
    return TiktokenSettings(CL100K_PATTERN, special, "<|end_of_text|>", "<|begin_of_text|>")


def _read_sidecar(file: Path) -> TiktokenSettings:
    try:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        unknown = set(content) - _SIDECAR_KEYS
        if unknown:
            raise DataFormatError(f"{file} has unknown keys {sorted(unknown)}, expected {sorted(_SIDECAR_KEYS)}")
        special = {str(name): int(token) for name, token in content.get("special_tokens", {}).items()}
        return TiktokenSettings(**{"pattern": CL100K_PATTERN, **content, "special_tokens": special})
    except (ValueError, TypeError, AttributeError) as error:
        raise DataFormatError(f"{file} is not a settings file for tiktoken ranks: {error}") from error
