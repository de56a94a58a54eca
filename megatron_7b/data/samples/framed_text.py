"""Texts between the special tokens of an encoder, before anything is hidden in them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from megatron_7b.data.samples.dataset import Dataset, DatasetPart
from megatron_7b.data.samples.sample_order import SampleOrder

NUM_FRAME_TOKENS = 2
"""[CLS] and [SEP]; a pair has one more [SEP]."""


@dataclass(frozen=True, kw_only=True)
class Frame:
    """The special tokens around texts."""

    cls_id: int
    """First token of each sample."""
    sep_id: int
    """Last token of each text."""
    pad_id: int | None = None
    """What fills samples up; None where they are full."""


@dataclass(frozen=True, kw_only=True)
class FramedTexts:
    """Several samples."""

    ids: NDArray[np.int64]
    """Frames, texts and padding, [b, s]."""
    is_text: NDArray[np.bool_]
    """False for frames, padding and what comes after the end of a corpus, [b, s]."""
    lengths: NDArray[np.int64]
    """Tokens of each sample without padding, [b]."""
    sets: NDArray[np.int64]
    """Of the blend, which set each is of, [b]."""
    numbers: NDArray[np.int64]
    """The number of each text within its set, [b]; it grows on from epoch to epoch."""
    versions: NDArray[np.int64]
    """Which of the samples of that text each is, [b]."""
    tokentype_ids: NDArray[np.int64] | None = None
    """0 in first texts of pairs, 1 in second ones, [b, s]."""
    pair_labels: NDArray[np.int64] | None = None
    """0 where the second text follows the first, else 1, [b]."""


class FramedSource(Protocol):
    """Framed texts by global sample number."""

    @property
    def seq_length(self) -> int:
        """Tokens per sample, frame and padding included."""

    @property
    def parts(self) -> tuple[DatasetPart, ...]:
        """The sets of the blend."""

    @property
    def order(self) -> SampleOrder:
        """What a checkpoint records of the order."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know about how they continue what a run has read."""

    @property
    def left_out(self) -> Sequence[str]:
        """Sets with too little text for one sample."""

    @property
    def num_samples(self) -> int:
        """Samples of one epoch."""

    def check_end(self, num_samples: int) -> None:
        """Refuse a run of more samples than there are."""

    def read(self, indices: Sequence[int] | NDArray[np.int64]) -> FramedTexts:
        """Return the samples of these numbers; any thread may call it."""


class FramedWindows:
    """Windows of the token stream between [CLS] and [SEP]: all of them full."""

    def __init__(self, windows: Dataset, frame: Frame, *, reads_per_window: int = 1) -> None:
        """Frame windows.

        Args:
            windows: Their sequence length is that of the samples less NUM_FRAME_TOKENS.
            frame: What stands around them.
            reads_per_window: As the windows were opened with.
        """
        self.seq_length = windows.seq_length + NUM_FRAME_TOKENS
        self.parts, self.order, self.notes = windows.parts, windows.order, windows.notes
        self.left_out, self.num_samples = windows.left_out, windows.num_samples
        self._windows, self._frame, self._reads = windows, frame, reads_per_window

    def check_end(self, num_samples: int) -> None:
        """Refuse a run that is longer than its data; see `NumberedSamples.check_end`."""
        self._windows.check_end(num_samples)

    def read(self, indices: Sequence[int] | NDArray[np.int64]) -> FramedTexts:
        """Return the samples of these numbers."""
        windows = self._windows.batch(indices)
        sets, samples = self._windows.locate(indices)
        shape = (len(indices), self.seq_length)
        ids, is_text = np.empty(shape, dtype=np.int64), np.zeros(shape, dtype=bool)
        ids[:, 0], ids[:, -1] = self._frame.cls_id, self._frame.sep_id
        ids[:, 1:-1] = windows.tokens
        is_text[:, 1:-1] = windows.loss_mask != 0  # what fills up the last window of a corpus is none
        return FramedTexts(
            ids=ids,
            is_text=is_text,
            lengths=np.full(len(indices), self.seq_length),
            sets=sets,
            numbers=samples // self._reads,
            versions=samples % self._reads,
        )
