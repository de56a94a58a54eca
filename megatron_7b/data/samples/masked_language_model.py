"""Masked-language-model samples (BERT): some words of framed texts are hidden, and the model is to tell them.

What is hidden follows from the seed, the set of the blend and the number of the text within it; the global sample
number is the whole state.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from megatron_7b.data.samples.dataset import Batch, DatasetPart
from megatron_7b.data.samples.framed_text import FramedSource
from megatron_7b.data.samples.masking import Masker, Masking
from megatron_7b.data.samples.sample_order import SampleOrder
from megatron_7b.data.samples.sample_random import sample_generator


class MaskedLanguageModelDataset:
    """Masked samples by global number."""

    def __init__(self, texts: FramedSource, masking: Masking, *, seed: int) -> None:
        """Mask framed texts.

        Args:
            texts: With as many samples per text as the masking has masks.
            masking: What to hide.
            seed: The run's.

        Raises:
            ConfigError: The masking is impossible.
        """
        self.texts = texts
        self.seq_length = texts.seq_length
        self._masker = Masker(masking)
        self._seed = seed

    @property
    def num_samples(self) -> int:
        """Samples of one epoch."""
        return self.texts.num_samples

    @property
    def parts(self) -> tuple[DatasetPart, ...]:
        """The sets of the texts."""
        return self.texts.parts

    @property
    def order(self) -> SampleOrder:
        """The order of the texts."""
        return self.texts.order

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know about how the texts continue what a run has read."""
        return self.texts.notes

    @property
    def left_out(self) -> tuple[str, ...]:
        """Sets with too little text for one sample."""
        return tuple(self.texts.left_out)

    def check_end(self, num_samples: int) -> None:
        """Refuse a run that is longer than its data; see `NumberedSamples.check_end`."""
        self.texts.check_end(num_samples)

    def batch(self, indices: Sequence[int] | NDArray[np.int64]) -> Batch:
        """Return the samples of these global numbers, in this order; each a document of its own, as is its padding."""
        texts = self.texts.read(indices)
        labels, shape = texts.ids, texts.ids.shape
        tokens, loss_mask = labels.copy(), np.zeros(shape, dtype=np.float32)
        is_word_before = np.zeros(shape, dtype=bool) if self._masker.masking.with_word_before else None
        for row in range(shape[0]):
            number = self.order.sets[int(texts.sets[row])].number
            of_text, version = int(texts.numbers[row]), int(texts.versions[row])
            generator = sample_generator(self._seed, f"masked words/{number}", of_text)
            words = self._masker.words(labels[row], texts.is_text[row])
            hidden = self._masker.draw(words, version, generator)
            tokens[row, hidden.places] = self._masker.replace(labels[row, hidden.places], generator)
            loss_mask[row, hidden.places] = 1.0
            if is_word_before is not None:
                is_word_before[row, hidden.before] = True
                loss_mask[row, hidden.before] = 1.0
        return Batch(
            tokens,
            labels,
            loss_mask,
            position_ids=np.tile(np.arange(shape[1], dtype=np.int64), (shape[0], 1)),
            cu_seqlens=_cumulative_lengths(texts.lengths, shape[1]),
            tokentype_ids=texts.tokentype_ids,
            is_word_before=is_word_before,
            pair_labels=texts.pair_labels,
        )


def _cumulative_lengths(lengths: NDArray[np.int64], seq_length: int) -> NDArray[np.int32]:
    """Return where texts and the padding after them begin in rows laid one after the other, and the end of all."""
    begins = np.arange(len(lengths)) * seq_length
    bounds = np.stack((begins, begins + lengths), axis=1)
    return np.unique(np.append(bounds, len(lengths) * seq_length)).astype(np.int32)
