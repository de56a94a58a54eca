"""What the rest of the package asks of an objective: what a model is trained, validated and evaluated to do."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from megatron_7b.config.schema import RunConfig
from megatron_7b.data import Batch
from megatron_7b.data.samples.dataset import DatasetPart, NumberedSamples
from megatron_7b.data.samples.opening import UNKNOWN_CONTENTS
from megatron_7b.data.samples.sample_order import Reached, SampleOrder
from megatron_7b.data.samples.split import Split
from megatron_7b.parallel import ParallelLayout
from megatron_7b.tokenizer import Tokenizer

if TYPE_CHECKING:
    import torch
    from torch import Tensor


ASIDE = "aside"
"""Under which `model_inputs` hands to `sums` what the model does not take."""


class Samples(Protocol):
    """The samples of one split by global number, as `data.Dataset` has them."""

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
    def left_out(self) -> tuple[str, ...]:
        """Sets with too little text for one sample."""

    @property
    def num_samples(self) -> int:
        """Samples of one epoch."""

    def check_end(self, num_samples: int) -> None:
        """Refuse a run of more samples than there are."""

    def batch(self, indices: Sequence[int] | NDArray[np.int64]) -> Batch:
        """Return the samples of these numbers; any thread may call it."""


class Sums(NamedTuple):
    """What one microbatch adds up to, on the last pipeline stage."""

    loss: "Tensor"
    """Differentiable FP32 sum of losses; the step divides it by `num_tokens` of the whole global batch."""
    num_tokens: "Tensor"
    """int32."""
    reported: "Tensor"
    """FP64 [1 + reported, 2]: sum and number, of the loss and of what else the objective reports."""


class Judging(Protocol):
    """Between batches and model: what goes in, and what is made of what comes out.

    Attributes:
        reported: Names of further means that it reports beside the loss.
    """

    reported: tuple[str, ...]

    def model_inputs(self, batch: Batch, device: "torch.device", layout: ParallelLayout) -> dict[str, Any]:
        """Return what the model's forward takes of one microbatch, on the device; `input_ids` is [rows, s/cp].

        What is under the key `ASIDE` is for `sums` alone.
        """

    def sums(self, output: Any, inputs: Mapping[str, Any]) -> Sums:
        """Return what the output of the last stage, whatever the kind of model makes it, adds up to."""


class Objective(Judging, Protocol):
    """Between data, model and training: it never changes; all of it follows from the configuration.

    Attributes:
        needs_tokenizer: It takes special tokens from the tokenizer of the corpora, which must be known.
    """

    needs_tokenizer: bool

    def num_losses(self, batch: Batch) -> int:
        """Return how many losses of a microbatch the mean is over, the `num_tokens` of its sums."""

    def states_compared(self, batch: Batch) -> NDArray[np.bool_]:
        """Return which tokens have hidden states that mean something, to be compared with a teacher's, [b, s]."""

    def check_tokenizer(self, config: RunConfig, tokenizer: Tokenizer | None) -> None:
        """Refuse a tokenizer that lacks a token that a run needs for this objective.

        Raises:
            ConfigError: It lacks one, or is not known.
        """

    def window_length(self, config: RunConfig) -> int:
        """Return how many tokens of text a sample is made of."""

    def predicted_share(self, config: RunConfig) -> float:
        """Return how many tokens are predicted, and so pass the output layer, for each one that a sample counts."""

    def open_windows(
        self,
        config: RunConfig,
        split: Split,
        *,
        contents: Mapping[str, str] = UNKNOWN_CONTENTS,
        reached: Reached | None = None,
    ) -> NumberedSamples:
        """Open the text that the samples of a split are made of, to count and check it without a tokenizer.

        Raises:
            ConfigError: The samples would not continue those of `reached`.
            DataFormatError: A file is damaged, or smaller than one sample.
        """

    def open_split(
        self,
        config: RunConfig,
        split: Split,
        tokenizer: Tokenizer | None,
        *,
        contents: Mapping[str, str],
        reached: Reached | None,
    ) -> Samples:
        """Open the samples of a split of the run's corpora.

        Args:
            config: The run; `model.vocab_size` is set.
            split: Which one.
            tokenizer: Of the corpora; None if it is not known.
            contents: `corpus_fingerprint` of each set by its prefix, for the record of the order.
            reached: What a resumed run has read of `train`; None for a fresh one.

        Raises:
            ConfigError: An option does not fit, a token is missing, or the samples would not continue those of
                `reached`.
            DataFormatError: A file is damaged, or smaller than one sample.
        """

    def open_corpus(self, prefix: str, config: RunConfig, tokenizer: Tokenizer | None) -> Samples:
        """Open a corpus from its first to its last token, as validation would see it.

        Raises:
            ConfigError: A token that the objective needs is missing.
            DataFormatError: A file is damaged, or smaller than one sample.
        """
