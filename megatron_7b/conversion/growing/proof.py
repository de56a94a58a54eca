"""What growing has changed: the logits of both models, and where there is text for it, their losses."""

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from megatron_7b.config.schema import ModelConfig, RunConfig
from megatron_7b.conversion.checkpoint_logits import checkpoint_logits
from megatron_7b.conversion.parity import Parity, compare_logits, random_tokens
from megatron_7b.conversion.progress import Report
from megatron_7b.data import open_sequential, parse_blend
from megatron_7b.errors import ConversionError, MegatronError
from megatron_7b.model.sizes import count_parameters
from megatron_7b.runtime.machine.host_memory import available_memory

TOLERANCE = 1e-5
"""Largest difference of a logit in FP32 arithmetic: absolute, or in units of the largest logit where that exceeds 1.

Copies change the order in which sums are taken, and nothing else: computed in FP64, the logits of models with random
weights are the same in every digit of FP32. Computed in FP32 they differ by up to 0.5e-5 of the largest.
"""

_NUM_SAMPLES, _LENGTH = 2, 128


class Probe:
    """The logits of the smaller model, to compare the larger one's with.

    Args:
        checkpoint: The smaller model.
        config: Its configuration.
        preserves: Whether the larger model is to compute the same; otherwise the text of the run is looked for.

    Raises:
        CheckpointError: The checkpoint is damaged.
    """

    def __init__(self, checkpoint: Path, config: RunConfig, *, preserves: bool) -> None:
        model = config.model
        assert model.vocab_size is not None
        length = min(_LENGTH, model.max_position_embeddings)
        self._checkpoint, self._preserves = checkpoint, preserves
        self._corpus = None if preserves else _corpus(config)
        if self._corpus is not None:
            self._tokens = _text(self._corpus, length, model.vocab_size)
        else:
            self._tokens = random_tokens(model.vocab_size, num_samples=_NUM_SAMPLES, length=length)
        self._vocab_size = model.vocab_size
        self._reference = self._logits(checkpoint)

    def check(self, checkpoint: Path, model: ModelConfig, report: Report) -> Parity:
        """Report how far the models are apart.

        Args:
            checkpoint: The larger model.
            model: Its shape.
            report: Takes the figures.

        Raises:
            ConversionError: They were to compute the same, and do not.
        """
        logits = self._logits(checkpoint)
        parity = compare_logits(self._reference, logits)
        if not self._preserves:
            report("changed", f"stacked layers compute something else: logits with a {parity.describe()}")
            if self._corpus is not None:
                losses = [_loss(each, self._tokens) for each in (self._reference, logits)]
                report(
                    "loss", f"{losses[0]:.4f} before, {losses[1]:.4f} after, over the first tokens of {self._corpus}"
                )
            return parity
        tolerance = TOLERANCE * max(1.0, self._reference.abs().max().item())
        if not parity.max_abs_difference <= tolerance:  # NaN is no proof
            raise ConversionError(
                f"the larger model computes other logits than the smaller one: {parity.describe()}; tolerated is "
                f"{tolerance:.1e} in FP32"
            )
        report("parity", f"{parity.describe()}; tolerated: {tolerance:.1e} in FP32")
        if parity.max_abs_difference > TOLERANCE and _fits_in_fp64(model, self._vocab_size):
            exact = [self._logits(folder, torch.float64) for folder in (self._checkpoint, checkpoint)]
            report("parity", f"in FP64, which rounds less, {compare_logits(*exact).describe()}")
        return parity

    def _logits(self, checkpoint: Path, arithmetic: torch.dtype = torch.float32) -> Tensor:
        return checkpoint_logits(checkpoint, self._tokens, arithmetic=arithmetic)[..., : self._vocab_size]


def _fits_in_fp64(model: ModelConfig, vocab_size: int) -> bool:
    return count_parameters(model, vocab_size=vocab_size) * torch.float64.itemsize < available_memory()


def _corpus(config: RunConfig) -> str | None:
    """Return the text that the smaller model knows, if it is a decoder's, and still there."""
    entries = config.data.valid or config.data.train
    if not entries or config.model.traits.kind != "decoder":
        return None
    try:
        prefix = parse_blend(entries)[0].prefix
        open_sequential(prefix, seq_length=1, vocab_size=config.model.vocab_size)
    except MegatronError:
        return None
    return prefix


def _text(prefix: str, length: int, vocab_size: int) -> Tensor:
    """Return the first tokens of a corpus, [b, s]."""
    dataset = open_sequential(prefix, seq_length=length, vocab_size=vocab_size)
    count = max(1, min(_NUM_SAMPLES, dataset.num_samples - 1))
    return torch.from_numpy(dataset.batch(range(count)).tokens)


def _loss(logits: Tensor, tokens: Tensor) -> float:
    """Return the mean loss of the next token, of logits [b, s, v] and tokens [b, s]."""
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).item()
