"""Output layer and cross entropy in one: the logits exist only a few hundred tokens at a time.

The gradients are taken in the forward pass, while a chunk of logits is still in the cache, so that neither the logits
nor the probabilities are kept, and nothing is computed twice. That is exact because what is returned is one number,
the masked sum of the token losses: the backward pass only scales.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_CHUNK_BYTES = 64 << 20  # of FP32 logits: near the size of a last-level cache, and products still run at full speed


class _LinearCrossEntropy(torch.autograd.Function):
    """Sum of masked token losses of `hidden @ weight.T` against labels, vocabulary-parallel."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        loss_mask: Tensor,
        first_token: int,
        num_true: int,
        group: dist.ProcessGroup | None,
    ) -> Tensor:
        with_gradients = any(ctx.needs_input_grad)
        loss_sum = hidden.new_zeros((), dtype=torch.float32)
        grad_hidden = torch.empty_like(hidden) if with_gradients else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if with_gradients else None
        rows = max(1, _CHUNK_BYTES // (4 * weight.shape[0]))
        for start in range(0, hidden.shape[0], rows):
            part = slice(start, start + rows)
            logits = hidden[part] @ weight.t()
            logits[:, num_true:] = torch.finfo(logits.dtype).min
            losses, grad_logits = _cross_entropy(logits, labels[part] - first_token, loss_mask[part], num_true, group)
            loss_sum += losses
            if grad_hidden is not None and grad_weight is not None:
                grad_logits = grad_logits.to(weight.dtype)
                torch.mm(grad_logits, weight, out=grad_hidden[part])
                if weight.dtype == torch.float32:
                    grad_weight.addmm_(grad_logits.t(), hidden[part])
                else:
                    grad_weight += grad_logits.t() @ hidden[part]
        if grad_hidden is not None and grad_weight is not None:
            ctx.save_for_backward(grad_hidden, grad_weight.to(weight.dtype))
        return loss_sum

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden.mul_(grad_output), grad_weight.mul_(grad_output), None, None, None, None, None


def _cross_entropy(
    logits: Tensor, labels: Tensor, loss_mask: Tensor, num_true: int, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """Return the masked sum of losses over the whole vocabulary, and its gradient by these logits.

    Args:
        logits: [n, v/tp], padding masked.
        labels: [n], relative to the first column; outside [0, v/tp) where another rank holds it.
        loss_mask: [n].
        num_true: Columns that stand for tokens.
        group: Tensor-parallel ranks; None for one.

    Returns:
        Loss sum (the same on all ranks) and gradient [n, v/tp].

    Collective: the tensor-parallel group.
    """
    held = (labels >= 0) & (labels < num_true)
    index = torch.where(held, labels, 0).unsqueeze(1)
    label_logits = logits.gather(1, index).squeeze(1).float()
    log_probabilities = torch.log_softmax(logits, dim=1, dtype=torch.float32)
    # Over this rank's columns only; another rank's are joined through the logarithm of the sum.
    label_log_probabilities = log_probabilities.gather(1, index).squeeze(1)
    probabilities = log_probabilities.exp_()
    if group is None:
        losses = -label_log_probabilities
        probabilities *= loss_mask.unsqueeze(1)
    else:
        local_normalizer = label_logits - label_log_probabilities
        normalizers = local_normalizer.new_empty(group.size(), *local_normalizer.shape)
        dist.all_gather(list(normalizers), local_normalizer, group=group)
        normalizer = torch.logsumexp(normalizers, dim=0)
        label_logits = torch.where(held, label_logits, 0.0)
        dist.all_reduce(label_logits, group=group)
        losses = normalizer - label_logits
        probabilities *= (torch.exp(local_normalizer - normalizer) * loss_mask).unsqueeze(1)
    probabilities.scatter_add_(1, index, torch.where(held, -loss_mask, 0.0).unsqueeze(1))
    return (losses * loss_mask).sum(), probabilities


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    loss_mask: Tensor,
    *,
    first_token: int,
    num_true: int,
    group: dist.ProcessGroup | None,
) -> Tensor:
    """Return the sum of the cross entropies of all tokens that the mask keeps.

    Args:
        hidden: Last hidden states, [n, h], the same on all tensor-parallel ranks.
        weight: This rank's rows of the output layer, [v/tp, h].
        labels: Token ids, [n].
        loss_mask: Weight of each token, [n].
        first_token: Token id of the first row.
        num_true: True vocabulary size less `first_token`: rows from there on are padding and get no probability.
        group: Tensor-parallel ranks, None where there is one. The gradient of `hidden` is this rank's part: the caller
            sums it over the group.

    Returns:
        FP32 scalar, the same on all ranks of the group.

    Collective: the tensor-parallel group.
    """
    num_true = max(0, min(num_true, weight.shape[0]))
    result: Tensor = _LinearCrossEntropy.apply(hidden, weight, labels, loss_mask.float(), first_token, num_true, group)
    return result
