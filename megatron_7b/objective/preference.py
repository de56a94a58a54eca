"""Which of two replies people prefer, or whether they want one (DPO and its kin, ORPO, KTO)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from megatron_7b.config.preferences import PREFERENCE_LOSSES
from megatron_7b.config.schema import RunConfig
from megatron_7b.data.preferences.encoding import LABELLED, PAIRS
from megatron_7b.data.preferences.reference import PARTS
from megatron_7b.data.samples.dataset import RecordsOfBatch
from megatron_7b.errors import ConfigError
from megatron_7b.objective.objective import ASIDE, Sums
from megatron_7b.objective.records import RecordObjective
from megatron_7b.parallel import ParallelLayout

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from megatron_7b.data import Batch
    from megatron_7b.objective.preference_losses import Replies


@dataclass(frozen=True)
class _Aside:
    """What the losses of tokens are made into replies with.

    Attributes:
        parts: Where each part begins and ends among the tokens.
        is_reply: 1 where the next token is one of a reply, [1, t].
        values: FP32 [records, k], the label if there are any, then the reference of each part.
    """

    parts: list[tuple[int, int]]
    is_reply: "Tensor"
    values: "Tensor"


class PreferenceTraining(RecordObjective):
    """Samples are rows of pairs, or of labelled replies; the loss is the mean over them."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config)
        self._options = config.finetune
        self.reported = PREFERENCE_LOSSES[config.finetune.preference_loss]
        self.kind = LABELLED if config.finetune.preference_loss == "kto" else PAIRS

    @property
    def needs_reference(self) -> bool:
        """Whether records need the logarithms of probabilities of the model that training starts from."""
        return self._options.preference_loss != "orpo"

    def model_inputs(self, batch: "Batch", device: "torch.device", layout: ParallelLayout) -> dict[str, Any]:
        """Return what the model's forward takes of one microbatch, on the device."""
        import torch

        inputs = super().model_inputs(batch, device, layout)
        if batch.records is None:  # a text by itself
            return inputs
        records, is_reply = batch.records, inputs["loss_mask"]
        if self._options.preference_loss == "orpo":
            inputs["loss_mask"] = torch.from_numpy(_with_prompts(records, batch.loss_mask)).to(device).reshape(1, -1)
        parts = list(zip(records.begins.tolist(), (records.begins + records.lengths).tolist(), strict=True))
        values = torch.from_numpy(records.values[records.record[::PARTS]]).to(device)
        return {**inputs, "by_token": True, ASIDE: _Aside(parts, is_reply, values)}

    def sums(self, output: "Tensor", inputs: Mapping[str, Any]) -> Sums:
        """Return the sum of the losses of the records, their number, and what is reported beside it."""
        import torch

        from megatron_7b.objective.preference_losses import preference_sums

        replies = self._replies(output, inputs[ASIDE])
        result = preference_sums(replies, self._options)
        count = torch.tensor(len(replies.logps), device=output.device)
        loss = torch.stack((result.loss.detach().double(), count.double()))
        reported = torch.stack((loss, *(result.reported[name] for name in self.reported)))
        return Sums(result.loss, count.to(torch.int), reported)

    def _replies(self, losses: "Tensor", aside: _Aside) -> "Replies":
        from megatron_7b.objective.preference_losses import Replies

        num_values = PARTS * self.needs_reference + (self.kind == LABELLED)
        if aside.values.shape[1] != num_values:
            raise ConfigError(
                f"the {self.kind} have no reference, which {self._options.preference_loss} compares with",
                hint="`megatron-7b finetune` makes it, of data.train and data.valid",
            )
        logps = -_of_parts(losses * aside.is_reply, aside.parts)
        lengths = _of_parts(aside.is_reply, aside.parts)
        if self._options.preference_loss == "orpo":
            chosen = aside.parts[::PARTS]
            counts = lengths.new_tensor([end - begin - 1 for begin, end in chosen])
            return Replies(logps, lengths, nll=_of_parts(losses, aside.parts)[:, 0], nll_lengths=counts)
        if self._options.preference_loss == "kto":
            return Replies(logps, lengths, aside.values[:, 1:], is_desirable=aside.values[:, 0] > 0)
        return Replies(logps, lengths, aside.values)


class ReplyProbabilities(PreferenceTraining):
    """The same samples, to learn only how probable the model finds each reply."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config)
        self.reported = ()

    def sums(self, output: "Tensor", inputs: Mapping[str, Any]) -> Sums:
        """Report the logarithms of the probabilities of the replies, [records, 2]."""
        aside = inputs[ASIDE]
        logps = -_of_parts(output * aside.is_reply, aside.parts)
        nothing = output.new_zeros(())
        return Sums(nothing, nothing.int(), logps)


def _with_prompts(records: RecordsOfBatch, loss_mask: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return a mask that keeps the prompt of each first part as well, [b, s]."""
    mask = loss_mask.copy()
    flat = mask.reshape(-1)
    for begin, length in zip(records.begins[::PARTS], records.lengths[::PARTS], strict=True):
        flat[begin : begin + length - 1] = 1
    return mask


def _of_parts(numbers: "Tensor", parts: list[tuple[int, int]]) -> "Tensor":
    """Return the sum over each part of numbers [1, t], [records, 2]."""
    import torch

    flat = numbers.flatten()
    sums = [flat[begin:end].sum() for begin, end in parts]
    return torch.stack(sums).view(-1, PARTS) if sums else flat[:0].view(0, PARTS)
