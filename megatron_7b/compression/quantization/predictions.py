"""What a model predicts of text before and after it was changed."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax, nll_loss

from megatron_7b.conversion.layerwise import LastStage


@dataclass(frozen=True)
class Predictions:
    """Means over all tokens but the first of each sample, in nats.

    Attributes:
        before: Of -ln p.
        after: The same, of the changed model.
        divergence: Of the Kullback-Leibler divergence of the changed model's predictions from the others.
        num_tokens: How many.
    """

    before: float
    after: float
    divergence: float
    num_tokens: int


@torch.inference_mode()
def compare_predictions(
    original: LastStage, before: Tensor, changed: LastStage, after: Tensor, samples: list[list[int]]
) -> Predictions:
    """Compare what two last stages make of their hidden states.

    Args:
        original: The last norm and output layer as they were.
        before: What the last layer gave, [n, s, h].
        changed: As they are.
        after: What the last layer gives.
        samples: The ids, [n][s].
    """
    totals = torch.zeros(3, dtype=torch.float64)
    for states, changed_states, sample in zip(before, after, samples, strict=True):
        labels = torch.tensor(sample[1:], device=states.device)
        expected = log_softmax(original(states[:-1]), dim=-1)
        found = log_softmax(changed(changed_states[:-1]), dim=-1)
        totals += (
            torch.stack(
                [
                    nll_loss(expected, labels, reduction="sum"),
                    nll_loss(found, labels, reduction="sum"),
                    kl_div(found, expected, reduction="sum", log_target=True),
                ]
            )
            .double()
            .cpu()
        )
    count = sum(len(sample) - 1 for sample in samples)
    loss_before, loss_after, divergence = (totals / count).tolist()
    return Predictions(loss_before, loss_after, divergence, count)
