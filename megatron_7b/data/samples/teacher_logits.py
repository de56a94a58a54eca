"""What a teacher finds most probable, written once: of each token of each sample of a run, in the order of the run.

A token's prediction depends on all tokens before it in its sample, so what is kept belongs to samples, not to places of
the corpus: to the seed, the sequence length and the blend that cut them. All three are recorded and compared.
"""

import dataclasses
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from megatron_7b.config.schema import DataConfig
from megatron_7b.data.samples.dataset import Batch, TopLogits
from megatron_7b.data.samples.sample_order import SampleOrder
from megatron_7b.errors import ConfigError, DataFormatError
from megatron_7b.files import replace_text

_PARTS = ("ids", "logps")
_FORMATS = {"fp16": np.float16, "fp32": np.float32}


@dataclass(frozen=True, kw_only=True)
class CachedLogits:
    """A cache, as its manifest describes it.

    Attributes:
        num_samples: Of the beginning of a run.
        top_k: Tokens kept of each prediction.
        temperature: What logits were divided by.
        vocab_size: Tokens that there are.
        tokenizer: Its identity; None if it is not known.
        teacher: Identity of the weights.
        dtype: Number format of the logarithms.
        order: What the samples are.
        reading: What else decides what a model reads in them: `reading_of`.
    """

    num_samples: int
    top_k: int
    temperature: float
    vocab_size: int
    tokenizer: str | None
    teacher: str
    dtype: Literal["fp16", "fp32"]
    order: dict[str, Any]
    reading: dict[str, Any]

    @classmethod
    def read(cls, prefix: str | Path) -> Self:
        """Read the manifest of a cache, and check the sizes of its files.

        Raises:
            DataFormatError: It is missing, damaged, or not complete.
        """
        path = Path(f"{prefix}.json")
        try:
            manifest = cls(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise DataFormatError(
                f"{path} describes no cached logits: {error}",
                hint="write them with `megatron-7b compress cache-logits`",
            ) from error
        for part in _PARTS:
            shape, dtype = manifest._layout(part)
            expected, file = int(np.prod(shape)) * np.dtype(dtype).itemsize, Path(f"{prefix}.{part}")
            size = file.stat().st_size if file.is_file() else None
            if size != expected:
                raise DataFormatError(f"{file} has {size} bytes, expected {expected}: it is not complete")
        return manifest

    def write(self, prefix: str | Path) -> None:
        """Write the manifest, which makes the cache complete."""
        replace_text(Path(f"{prefix}.json"), json.dumps(dataclasses.asdict(self), indent=1) + "\n")

    def open(self, prefix: str | Path, mode: Literal["r", "w+"] = "r") -> TopLogits:
        """Map the files, [samples, s, k] and [samples, s, k + 1].

        Raises:
            OSError: They are to be written, and the disk has no room for them; nothing is left of them.
        """
        if mode == "w+":
            self._reserve(prefix)
        ids, logps = (
            np.memmap(
                f"{prefix}.{part}",
                mode="r" if mode == "r" else "r+",
                shape=self._layout(part)[0],
                dtype=self._layout(part)[1],
            )
            for part in _PARTS
        )
        return TopLogits(ids, logps)

    def _reserve(self, prefix: str | Path) -> None:
        """Make the files with all their room on the disk: a mapped one that runs out of it ends the process."""
        files = [Path(f"{prefix}.{part}") for part in _PARTS]
        try:
            for file, part in zip(files, _PARTS, strict=True):
                shape, dtype = self._layout(part)
                with file.open("wb") as stream:
                    os.posix_fallocate(stream.fileno(), 0, math.prod(shape) * np.dtype(dtype).itemsize)
        except OSError as error:
            for made in files:
                made.unlink(missing_ok=True)
            raise OSError(error.errno, error.strerror, str(file)) from error

    def _layout(self, part: str) -> tuple[tuple[int, int, int], Any]:
        length = int(self.order["seq_length"])
        if part == "ids":
            return (self.num_samples, length, self.top_k), np.uint32
        return (self.num_samples, length, self.top_k + 1), _FORMATS[self.dtype]


def bytes_per_token(top_k: int, dtype: Literal["fp16", "fp32"]) -> int:
    """Return how much of a cache each token takes."""
    return np.dtype(np.uint32).itemsize * top_k + np.dtype(_FORMATS[dtype]).itemsize * (top_k + 1)


class Samples(Protocol):
    """What is read by number."""

    @property
    def num_samples(self) -> int:
        """Samples of one epoch."""

    @property
    def order(self) -> SampleOrder:
        """What they are."""

    def batch(self, indices: NDArray[np.int64]) -> Batch:
        """Return the samples of these numbers."""


class TaughtSamples:
    """Samples of a run, each with what a teacher has said of it.

    Args:
        samples: Those of the run.
        prefix: Of the cache.
        num_samples: How many the whole run takes.
        data: How the run reads its samples.

    Raises:
        ConfigError: The cache is of other samples, or of fewer.
        DataFormatError: It is damaged.
    """

    def __init__(self, samples: Samples, prefix: str, num_samples: int, data: DataConfig) -> None:
        manifest = CachedLogits.read(prefix)
        differences = _differences(SampleOrder.from_dict(manifest.order), samples.order)
        differences += [
            f"{name} is {manifest.reading.get(name)!r} there, {value!r} here"
            for name, value in reading_of(data).items()
            if manifest.reading.get(name) != value
        ]
        if differences:
            raise ConfigError(
                f"the cached logits {prefix} are of other samples than this run reads: {'; '.join(differences)}",
                hint="write them with the data.* options, the seed and the corpora of the run",
            )
        if num_samples > manifest.num_samples:
            raise ConfigError(
                f"the cached logits {prefix} are of {manifest.num_samples:,} samples, the run takes {num_samples:,}",
                hint="shorten training.train_steps, or write them with a larger --num-samples",
            )
        self._samples, self._logits, self._last = samples, manifest.open(prefix), manifest.num_samples - 1

    @property
    def num_samples(self) -> int:
        """Samples of one epoch."""
        return self._samples.num_samples

    def batch(self, indices: NDArray[np.int64]) -> Batch:
        """Return the samples of these numbers; what is read ahead of the end gets the last sample's logits."""
        batch, rows = self._samples.batch(indices), np.minimum(indices, self._last)
        return dataclasses.replace(batch, top_logits=TopLogits(self._logits.ids[rows], self._logits.logps[rows]))


def reading_of(data: DataConfig) -> dict[str, Any]:
    """Return the settings that the order of samples knows nothing of, and that change what is predicted in them."""
    names = ("reset_attention_mask", "reset_position_ids", "fim_rate", "fim_spm_rate")
    return {name: getattr(data, name) for name in names}


def _differences(written: SampleOrder, read: SampleOrder) -> list[str]:
    """Say what makes two orders differ; where corpora are does not matter."""
    found = []
    for name in ("seq_length", "seed", "first_sample", "cut"):
        ours, theirs = getattr(written, name), getattr(read, name)
        if ours != theirs:
            found.append(f"{name} is {ours!r} there, {theirs!r} here")
    sets = [
        [(one.identity, one.number, one.weight, one.max_samples, one.consumed) for one in order.sets]
        for order in (written, read)
    ]
    if sets[0] != sets[1]:
        found.append("corpora, their weights or data.split differ")
    return found
