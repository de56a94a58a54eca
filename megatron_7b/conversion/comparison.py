"""The proof of a conversion: logits of the Hugging Face folder against those of the checkpoint, on random tokens."""

import functools
from collections.abc import Collection, Mapping
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from megatron_7b.config.schema import ModelConfig
from megatron_7b.conversion.checkpoint_logits import checkpoint_logits
from megatron_7b.conversion.parity import check_parity, hugging_face_logits, random_tokens
from megatron_7b.conversion.progress import Report
from megatron_7b.errors import ConversionError
from megatron_7b.runtime.machine.device import resolve_device

_NUM_SAMPLES, _LENGTH = 2, 128


class Comparison:
    """The logits of a Hugging Face folder on random tokens, computed at once, to compare a checkpoint's with.

    transformers comes first: our half may put the CPU backend in place, and one model at a time has to fit into memory.

    Args:
        folder: Hugging Face folder.
        model: Its shape.
        vocab_size: Its true vocabulary size.
        arithmetic: Number format that both are computed in.
        round_to: Number format that weights are rounded to beforehand; None leaves them as they are.
        unused: Tensors of the folder that the model does not have.
        fresh: Tensors that the folder lacks, by name.
        adapter: A PEFT folder that belongs to it.

    Raises:
        ConversionError: Transformers cannot load the folder, or compute with it.
    """

    def __init__(
        self,
        folder: Path,
        model: ModelConfig,
        vocab_size: int,
        arithmetic: torch.dtype,
        *,
        round_to: torch.dtype | None = None,
        unused: Collection[str] = (),
        fresh: Mapping[str, Tensor] = MappingProxyType({}),
        adapter: Path | None = None,
    ) -> None:
        self._arithmetic = arithmetic
        length = min(_LENGTH, model.max_position_embeddings)
        self._tokens = random_tokens(vocab_size, num_samples=_NUM_SAMPLES, length=length)
        self._compute_reference = functools.partial(
            hugging_face_logits,
            folder,
            self._tokens,
            model=model,
            round_to=round_to,
            arithmetic=arithmetic,
            device=resolve_device("auto"),
            unused=unused,
            fresh=fresh,
            adapter=adapter,
        )
        self._references = {False: self._compute_reference()}
        """Logits of tokens, and where a head classifies pairs its own, by whether they are of pairs."""
        if model.add_binary_head:
            self._references[True] = self._compute_reference(of_pairs=True)

    def check(
        self, checkpoint: Path, report: Report, *, round_to: torch.dtype | None = None, merged: bool = False
    ) -> None:
        """Report how far the models are apart.

        Args:
            checkpoint: A complete checkpoint.
            report: Takes the figures.
            round_to: As for the folder.
            merged: Merge the checkpoint's adapter into its model, before anything is rounded.

        Raises:
            ConversionError: They differ by more than rounding explains.
        """
        for of_pairs, reference in self._references.items():
            compute = functools.partial(
                checkpoint_logits,
                checkpoint,
                self._tokens,
                round_to=round_to,
                arithmetic=self._arithmetic,
                of_pairs=of_pairs,
                merged=merged,
            )
            try:
                parity = check_parity(reference, compute(), arithmetic=self._arithmetic)
            except ConversionError as error:
                # Seen once: one position off by 2e-4, and by 4e-6 when the same was computed again; see
                # runtime/cpu/vector_math.py for what it may have been. A wrong conversion is wrong every time.
                report("parity", f"{error}\n         computing both once more")
                reference = self._compute_reference(of_pairs=of_pairs)
                parity = check_parity(reference, compute(), arithmetic=self._arithmetic)
            what = "classes of pairs: " if of_pairs else ""
            report("parity", f"{what}{parity.describe()}; tolerated: {parity.tolerance(self._arithmetic)}")
