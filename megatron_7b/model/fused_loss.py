"""Output layer and cross entropy in one: only a few hundred tokens' logits exist at a time.

The gradients are computed in the forward pass, while a chunk of logits is still in the cache, so neither logits nor
probabilities are stored, and nothing is computed twice. This is exact because the result is a single number, the masked
sum of the token losses: the backward pass only scales.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_7b.runtime.cpu import kernels as cpu_kernels
from megatron_7b.runtime.cpu.kernels import accumulate_weight_gradient

_CHUNK_BYTES = 64 << 20  # of FP32 logits: near the size of a last-level cache, and products still run at full speed


class _LinearCrossEntropy(torch.autograd.Function):
    """Sum of masked token losses of `hidden @ weight.T + bias` against labels, vocabulary-parallel."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        loss_mask: Tensor,
        first_token: int,
        num_true: int,
        group: dist.ProcessGroup | None,
    ) -> Tensor:
        with_gradients = any(ctx.needs_input_grad)
        loss_sum = hidden.new_zeros((), dtype=torch.float64)  # of as many chunks as there are
        grad_hidden = torch.empty_like(hidden) if with_gradients else None
        ctx.in_main_grad = with_gradients and hidden.device.type == "cpu" and hasattr(weight, "main_grad")
        if ctx.in_main_grad:
            grad_weight = weight.main_grad  # type: ignore[attr-defined]
        else:
            grad_weight = torch.zeros_like(weight, dtype=torch.float32) if with_gradients else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if with_gradients and bias is not None else None
        rows = max(1, _CHUNK_BYTES // (4 * weight.shape[0]))
        for start in range(0, hidden.shape[0], rows):
            part = slice(start, start + rows)
            logits = hidden[part] @ weight.t() if bias is None else torch.addmm(bias, hidden[part], weight.t())
            losses, grad_logits = _cross_entropy(logits, labels[part] - first_token, loss_mask[part], num_true, group)
            loss_sum += losses
            if grad_hidden is not None:
                grad_logits = grad_logits.to(weight.dtype)
                torch.mm(grad_logits, weight, out=grad_hidden[part])
                accumulate_weight_gradient(hidden[part], grad_logits, grad_weight)
            if grad_bias is not None:
                grad_bias += grad_logits.sum(dim=0, dtype=torch.float32)
        ctx.grad_bias = None if bias is None or grad_bias is None else grad_bias.to(bias.dtype)
        if ctx.in_main_grad:
            ctx.weight = weight
            ctx.save_for_backward(grad_hidden)
        elif grad_hidden is not None:
            ctx.save_for_backward(grad_hidden, grad_weight.to(weight.dtype))
        return loss_sum.float()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, *rest = ctx.saved_tensors
        if ctx.in_main_grad:
            # What is in the gradient buffer cannot be scaled any more. The schedule has no reason to: it divides by
            # the tokens of the whole batch at the end.
            assert grad_output.item() == 1.0, "the sum of the token losses was scaled before its backward pass"
            grad_weight = _stand_in(ctx.weight)
        else:
            grad_weight = rest[0].mul_(grad_output)
            grad_hidden = grad_hidden.mul_(grad_output)
        grad_bias = None if ctx.grad_bias is None else ctx.grad_bias * grad_output
        return grad_hidden, grad_weight, grad_bias, None, None, None, None, None


def _stand_in(weight: Tensor) -> Tensor:
    """Return a gradient that tells the gradient buffer's hook that this weight's is in the buffer already.

    Source: the protocol of megatron-core's linear layers with `gradient_accumulation_fusion`: where the weight is also
    the embedding (`zero_out_wgrad`), the hook adds what autograd collected from both, so this part must be zero.
    """
    weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    return torch.zeros_like(weight) if getattr(weight, "zero_out_wgrad", False) else torch.empty_like(weight)


def _cross_entropy(
    logits: Tensor, labels: Tensor, loss_mask: Tensor, num_true: int, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """Return the masked sum of losses over the whole vocabulary, and its gradient by these logits.

    Args:
        logits: [n, v/tp]; overwritten.
        labels: [n], relative to the first column; outside [0, v/tp) where another rank holds it.
        loss_mask: [n].
        num_true: Columns that belong to tokens.
        group: Tensor-parallel ranks; None for one.

    Returns:
        Loss sum (the same on all ranks) and gradient [n, v/tp].

    Collective: the tensor-parallel group.
    """
    held = (labels >= 0) & (labels < num_true)
    index = torch.where(held, labels, 0).unsqueeze(1)
    label_logits = logits.gather(1, index).squeeze(1).float()
    # Over this rank's columns only; another rank's are joined through the logarithm of the sum.
    factor = loss_mask if group is None else torch.ones_like(loss_mask)
    if cpu_kernels.is_supported(logits):
        normalizer, probabilities = cpu_kernels.softmax_(logits, factor, num_true), logits
    else:
        logits[:, num_true:] = torch.finfo(logits.dtype).min
        log_probabilities = torch.log_softmax(logits, dim=1, dtype=torch.float32)
        normalizer = label_logits - log_probabilities.gather(1, index).squeeze(1)
        probabilities = log_probabilities.exp_().mul_(factor.unsqueeze(1))
    if group is not None:
        mine = torch.stack((normalizer, torch.where(held, label_logits, 0.0)))
        of_ranks = mine.new_empty(group.size(), *mine.shape)
        dist.all_gather(list(of_ranks), mine, group=group)
        local, normalizer, label_logits = normalizer, torch.logsumexp(of_ranks[:, 0], dim=0), of_ranks[:, 1].sum(dim=0)
        probabilities *= (torch.exp(local - normalizer) * loss_mask).unsqueeze(1)
    # p - 1 of the label from FP32: where p is almost 1, a BF16 one has lost what counts.
    label_gradient = (torch.expm1(label_logits - normalizer) * loss_mask).to(probabilities.dtype).unsqueeze(1)
    of_index = torch.where(held.unsqueeze(1), label_gradient, probabilities.gather(1, index))
    probabilities.scatter_(1, index, of_index)
    return ((normalizer - label_logits) * loss_mask).sum(), probabilities


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    loss_mask: Tensor,
    *,
    bias: Tensor | None = None,
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
        bias: This rank's part of the output layer's bias, [v/tp].
        first_token: Token id of the first row.
        num_true: True vocabulary size less `first_token`: rows from there on are padding and get no probability.
        group: Tensor-parallel ranks, None where there is one. The gradient of `hidden` is this rank's part: the caller
            sums it over the group.

    Returns:
        FP32 scalar, the same on all ranks of the group.

    Collective: the tensor-parallel group.
    """
    num_true = max(0, min(num_true, weight.shape[0]))
    result: Tensor = _LinearCrossEntropy.apply(
        hidden, weight, bias, labels, loss_mask.float(), first_token, num_true, group
    )
    return result
