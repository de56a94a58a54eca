"""Encoders for whole batches: the tokenizer itself (the reference), and faster libraries for the same definition.

A batch comes back flat, one array of ids and one of lengths, because a Python list per document costs more than the
encoding itself. Which ids a fast engine gives is never taken on trust: see `megatron_7b.tokenizer.checked`.

NumPy is imported by the first batch only, so that an engine can be built, which takes as long, while NumPy is imported.
"""

import os
import sys
import threading
from collections.abc import Callable, Sequence
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from megatron_7b.errors import ConfigError
from megatron_7b.tokenizer.base import Tokenizer

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

type FlatIds = tuple[NDArray[np.uint32], NDArray[np.int64]]
"""Ids of a batch one after another [total], and how many belong to each text [number of texts]."""

ENGINE_NAMES = ("auto", "tokenizers", "fastokens", "gigatoken")


class Engine(Protocol):
    """Encodes batches; safe to call from several threads at once."""

    @property
    def name(self) -> str:
        """Library and version."""

    def encode_flat(self, texts: Sequence[str]) -> FlatIds:
        """Encode texts that hold no lone surrogates."""


class ReferenceEngine:
    """The tokenizer's own library: slow, and right by definition."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        library = {"hugging_face": "tokenizers"}.get(tokenizer.kind, tokenizer.kind)
        self.name = _name_with_version(library)

    def encode_flat(self, texts: Sequence[str]) -> FlatIds:
        """Encode with the tokenizer."""
        import numpy as np

        encoded = self._tokenizer.encode_batch(texts)
        lengths = np.fromiter(map(len, encoded), np.int64, len(encoded))
        ids = np.empty(int(lengths.sum()), np.uint32)
        end = 0
        for document in encoded:
            ids[end : end + len(document)] = document
            end += len(document)
        return ids, lengths


class ByteEngine:
    """Bytes need no library: the text's UTF-8 is its ids."""

    name = "bytes"

    def encode_flat(self, texts: Sequence[str]) -> FlatIds:
        """Widen the bytes of all texts at once."""
        import numpy as np

        encoded = [text.encode() for text in texts]
        lengths = np.fromiter(map(len, encoded), np.int64, len(encoded))
        return np.frombuffer(b"".join(encoded), np.uint8).astype(np.uint32), lengths


class FastokensEngine:
    """fastokens: byte-identical to `tokenizers` in all that we have measured, some 40 times as fast."""

    def __init__(self, definition: bytes) -> None:
        self._backend = _load_native("fastokens").Tokenizer.from_json_str(definition.decode())
        self.name = _name_with_version("fastokens")

    def encode_flat(self, texts: Sequence[str]) -> FlatIds:
        """Encode on the caller's thread, with the GIL released."""
        import numpy as np

        ids, offsets = self._backend.encode_batch_flat(texts if isinstance(texts, list) else list(texts))
        ends = np.frombuffer(offsets, np.uint64).astype(np.int64)
        return np.frombuffer(ids, np.uint32), ends[1:] - ends[:-1]


class GigatokenEngine:
    """gigatoken: as fast, but its caches grow with the corpus, so only on request."""

    def __init__(self, definition: bytes) -> None:
        self._definition = definition
        self._local = threading.local()
        self._local.backend = self._build()  # so that an unsupported definition shows here, not in a worker
        self.name = _name_with_version("gigatoken")

    def encode_flat(self, texts: Sequence[str]) -> FlatIds:
        """Encode text by text; its batch interface would import awkward, which takes longer than the work."""
        import numpy as np

        backend = getattr(self._local, "backend", None)
        if backend is None:
            backend = self._local.backend = self._build()
        encoded: list[NDArray[np.uint32]] = [backend.encode(text) for text in texts]
        lengths = np.fromiter(map(len, encoded), np.int64, len(encoded))
        return np.concatenate(encoded) if encoded else np.empty(0, np.uint32), lengths

    def _build(self) -> Any:
        from gigatoken.gigatoken_rs import load_hf_json

        return load_hf_json(self._definition)


def build_reference_engine(tokenizer: Tokenizer) -> Engine:
    """Return the engine that is right by definition."""
    return ByteEngine() if tokenizer.kind == "bytes" else ReferenceEngine(tokenizer)


def build_fast_engine(tokenizer: Tokenizer, engine: str, num_threads: int) -> tuple[Engine | None, str]:
    """Return the fast engine for a tokenizer, or None with the reason in words.

    Args:
        tokenizer: Any kind; fast engines know Hugging Face definitions.
        engine: One of `ENGINE_NAMES`.
        num_threads: Threads that will call it, and of gigatoken's own pool.

    Raises:
        ConfigError: An engine was asked for by name and cannot serve.
    """
    # tokenizers and gigatoken size one process-wide pool at first use, from this variable.
    os.environ.setdefault("RAYON_NUM_THREADS", str(num_threads))
    # fastokens would add a pool of its own, whose every thread fills a cache of words, and spins between batches.
    os.environ.setdefault("FASTOKENS_BPE_THREADS", "1")
    if engine == "tokenizers":
        return None, "the reference was asked for"
    definition = getattr(tokenizer, "json", None)
    candidates: dict[str, Callable[[bytes], Engine]] = {"fastokens": FastokensEngine, "gigatoken": GigatokenEngine}
    name = "fastokens" if engine == "auto" else engine
    if name not in candidates:
        raise ConfigError(f"engine {engine!r} is unknown, expected one of {', '.join(ENGINE_NAMES)}")
    if not isinstance(definition, bytes):
        what = (
            "tokenizers that split special tokens"
            if tokenizer.kind == "hugging_face"
            else f"{tokenizer.kind} tokenizers"
        )
        reason = f"{name} does not read {what}"
    elif find_spec(name) is None:
        reason = f"{name} is not installed"
    else:
        try:
            return candidates[name](definition), ""
        except Exception as error:  # noqa: BLE001  # the libraries raise several kinds for a definition that they do not know
            reason = f"{name} does not support this tokenizer: {error}"
    if engine != "auto":
        raise ConfigError(reason, hint="--engine auto takes the fastest engine that works")
    return None, reason


def _load_native(package: str) -> Any:
    """Return a package's native module without the package, which takes longer to import than a small run lasts."""
    name = f"{package}._native"
    if name not in sys.modules:
        found = find_spec(package)
        assert found is not None
        assert found.origin is not None
        file = next(Path(found.origin).parent.glob("_native*.so"))
        spec = spec_from_file_location(name, file)
        assert spec is not None
        assert spec.loader is not None
        module = module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules[name] = module
    return sys.modules[name]


def _name_with_version(library: str) -> str:
    found = find_spec(library)
    if found is None or found.origin is None:
        return library
    # By the name of the folder, because importlib.metadata takes longer to import than all that is read here.
    folders = [folder.name for folder in Path(found.origin).parents[1].glob(f"{library}-*.dist-info")]
    return f"{library} {folders[0].removesuffix('.dist-info').rpartition('-')[2]}" if len(folders) == 1 else library
