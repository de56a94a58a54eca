"""Output layer and cross entropy in one: only a few hundred tokens' logits exist at a time.

Where the masked sum of the token losses is wanted, the gradients are computed in the forward pass, while a chunk of
logits is still in the cache, so neither logits nor probabilities are stored, and nothing is computed twice. This is
exact because the backward pass only scales. Where the caller makes something else of the losses of single tokens, the
backward pass computes each chunk of logits once more.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_7b import upstream
from megatron_7b.runtime.cpu import kernels as cpu_kernels
from megatron_7b.runtime.cuda import kernels as cuda_kernels
from megatron_7b.runtime.weight_gradients import accumulate_weight_gradient, stand_in

_CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 1 << 30}
"""Of FP32 logits. On a CPU near the size of a last-level cache, and products still run at full speed; on a GPU each
chunk reads all weights three times, which takes as long as some hundred tokens."""
_TILE_ROWS = 64  # a product of 512 tokens runs up to 10 % faster than one of 524


class Vocabulary(NamedTuple):
    """Which tokens this rank's rows of the output layer are of."""

    first_token: int
    """Token id of the first row."""
    num_true: int
    """Rows that belong to tokens, the first ones."""
    group: dist.ProcessGroup | None
    """Tensor-parallel ranks; None for one."""
    size: int
    """Tokens of all ranks."""
    smoothing: float = 0.0
    """Share of each label that is spread over all tokens."""


class OutputLayer(NamedTuple):
    """This rank's part of the output layer."""

    weight: Tensor
    """[v/tp, h]."""
    bias: Tensor | None
    """[v/tp]."""
    vocabulary: Vocabulary


@dataclass(frozen=True)
class Gradients:
    """The gradients of a weighted sum of token losses, as a sweep over the tokens adds them up.

    Attributes:
        hidden: [n, h].
        weight: [v/tp, h] in FP32, or megatron-core's gradient buffer; None if the weight isn't trained.
        bias: [v/tp] in FP32; None if there is none.
        in_main_grad: `weight` is that buffer.
    """

    hidden: Tensor
    weight: Tensor | None
    bias: Tensor | None
    in_main_grad: bool

    @classmethod
    def build(cls, hidden: Tensor, layer: OutputLayer, *, is_trained: bool) -> Self:
        """Return zeros, or the gradient buffer that is there."""
        adds_in_place = hidden.device.type == "cpu" or cuda_kernels.adds_in_fp32(hidden)
        in_main_grad = is_trained and adds_in_place and hasattr(layer.weight, "main_grad")
        if in_main_grad:
            weight: Tensor | None = layer.weight.main_grad  # type: ignore[attr-defined]
        else:
            weight = torch.zeros_like(layer.weight, dtype=torch.float32) if is_trained else None
        bias = None if layer.bias is None else torch.zeros_like(layer.bias, dtype=torch.float32)
        return cls(torch.empty_like(hidden), weight, bias, in_main_grad)

    def add(self, part: slice, hidden: Tensor, grad_logits: Tensor, layer: OutputLayer) -> None:
        """Add what one chunk of tokens contributes, given its hidden states and the gradient by its logits."""
        grad_logits = grad_logits.to(layer.weight.dtype)
        torch.mm(grad_logits, layer.weight, out=self.hidden[part])
        if self.weight is not None:
            accumulate_weight_gradient(hidden, grad_logits, self.weight)
        if self.bias is not None:
            self.bias.add_(grad_logits.sum(dim=0, dtype=torch.float32))

    def by_inputs(self, layer: OutputLayer) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return the gradients by hidden states, weight and bias, each in the number format of its tensor."""
        weight = None if self.weight is None or self.in_main_grad else self.weight.to(layer.weight.dtype)
        bias = None if self.bias is None or layer.bias is None else self.bias.to(layer.bias.dtype)
        return self.hidden, weight, bias


def _sweep(hidden: Tensor, layer: OutputLayer, labels: Tensor, weights: Tensor, gradients: Gradients | None) -> Tensor:
    """Return the loss of each token, [n]; the gradients of their weighted sum are added to `gradients`."""
    losses = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
    rows = max(1, _CHUNK_BYTES[hidden.device.type] // (4 * layer.weight.shape[0]))
    rows -= rows % _TILE_ROWS if rows > _TILE_ROWS else 0
    for start in range(0, hidden.shape[0], rows):
        part = slice(start, start + rows)
        chunk = hidden[part]
        logits = chunk @ layer.weight.t() if layer.bias is None else torch.addmm(layer.bias, chunk, layer.weight.t())
        losses[part], grad_logits = _cross_entropy(logits, labels[part], weights[part], layer.vocabulary)
        if gradients is not None:
            gradients.add(part, chunk, grad_logits, layer)
    return losses


class _LinearCrossEntropy(torch.autograd.Function):
    """Sum of masked token losses of `hidden @ weight.T + bias` against labels, vocabulary-parallel."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        vocabulary: Vocabulary,
        labels: Tensor,
        mask: Tensor,
    ) -> Tensor:
        layer, gradients = OutputLayer(weight, bias, vocabulary), None
        if any(ctx.needs_input_grad):
            gradients = Gradients.build(hidden, layer, is_trained=ctx.needs_input_grad[1])
            ctx.layer, ctx.in_main_grad = layer, gradients.in_main_grad
        losses = _sweep(hidden, layer, labels, mask, gradients)
        if gradients is not None:
            ctx.save_for_backward(*gradients.by_inputs(layer))
        return (losses * mask).sum(dtype=torch.float64).float()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight, grad_bias = ctx.saved_tensors
        if ctx.in_main_grad:
            # What is in the gradient buffer cannot be scaled any more. The schedule has no reason to: it divides by
            # the tokens of the whole batch at the end.
            upstream.assert_on_device(grad_output == 1.0, "the sum of token losses was scaled before its backward pass")
            grad_weight = stand_in(ctx.layer.weight)
        else:
            grad_weight = None if grad_weight is None else grad_weight.mul_(grad_output)
            grad_hidden = grad_hidden.mul_(grad_output)
        grad_bias = None if grad_bias is None else grad_bias * grad_output
        return grad_hidden, grad_weight, grad_bias, None, None, None


class _LinearTokenLosses(torch.autograd.Function):
    """Loss of each token of `hidden @ weight.T + bias` against labels, vocabulary-parallel."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, vocabulary: Vocabulary, labels: Tensor
    ) -> Tensor:
        layer = OutputLayer(weight, bias, vocabulary)
        ctx.layer, ctx.is_trained = layer, ctx.needs_input_grad[1]
        ctx.save_for_backward(hidden, labels)
        return _sweep(hidden, layer, labels, hidden.new_ones(hidden.shape[0], dtype=torch.float32), None)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        hidden, labels = ctx.saved_tensors
        gradients = Gradients.build(hidden, ctx.layer, is_trained=ctx.is_trained)
        _sweep(hidden, ctx.layer, labels, grad_output, gradients)
        grad_hidden, grad_weight, grad_bias = gradients.by_inputs(ctx.layer)
        if gradients.in_main_grad:
            grad_weight = stand_in(ctx.layer.weight)
        return grad_hidden, grad_weight, grad_bias, None, None


def _cross_entropy(logits: Tensor, labels: Tensor, weights: Tensor, vocabulary: Vocabulary) -> tuple[Tensor, Tensor]:
    """Return the losses over the whole vocabulary, and the gradient of their weighted sum by these logits.

    Args:
        logits: [n, v/tp]; overwritten.
        labels: Token ids, [n].
        weights: FP32 [n].
        vocabulary: Which tokens the columns are of.

    Returns:
        FP32 losses [n], the same on all ranks and not weighted, and gradient [n, v/tp].

    Collective: the tensor-parallel group.
    """
    _, num_true, group, size, smoothing = vocabulary
    labels = labels - vocabulary.first_token  # outside of the columns where another rank holds it
    held = (labels >= 0) & (labels < num_true)
    index = torch.where(held, labels, 0).unsqueeze(1)
    label_logits = logits.gather(1, index).squeeze(1).float()
    mean_logits = torch.zeros_like(label_logits)
    if smoothing:
        mean_logits = logits[:, :num_true].sum(dim=1, dtype=torch.float32) / size
    # Over this rank's columns only; another rank's are joined through the logarithm of the sum.
    factor = weights if group is None else torch.ones_like(weights)
    kernels = next((module for module in (cpu_kernels, cuda_kernels) if module.is_supported(logits)), None)
    if kernels is not None:
        normalizer, probabilities = kernels.softmax_(logits, factor, num_true), logits
    else:
        logits[:, num_true:] = torch.finfo(logits.dtype).min
        log_probabilities = torch.log_softmax(logits, dim=1, dtype=torch.float32)
        normalizer = label_logits - log_probabilities.gather(1, index).squeeze(1)
        probabilities = log_probabilities.exp_().mul_(factor.unsqueeze(1))
    if group is not None:
        mine = torch.stack((normalizer, torch.where(held, label_logits, 0.0), mean_logits))
        of_ranks = mine.new_empty(group.size(), *mine.shape)
        dist.all_gather(list(of_ranks), mine, group=group)
        local, normalizer = normalizer, torch.logsumexp(of_ranks[:, 0], dim=0)
        label_logits, mean_logits = of_ranks[:, 1:].sum(dim=0)
        probabilities *= (torch.exp(local - normalizer) * weights).unsqueeze(1)
    # p - 1 of the label from FP32: where p is almost 1, a BF16 one has lost what counts.
    label_gradient = torch.expm1(label_logits - normalizer) * weights
    expected_logits = label_logits
    if smoothing:
        of_each = smoothing / size * weights
        probabilities[:, :num_true] -= of_each.unsqueeze(1)
        label_gradient += smoothing * weights - of_each
        expected_logits = torch.lerp(label_logits, mean_logits, smoothing)
    label_gradient = label_gradient.to(probabilities.dtype)
    at_labels = torch.arange(len(index), device=index.device), index.squeeze(1)
    # Not scatter_, which makes two copies of all probabilities.
    probabilities[at_labels] = torch.where(held, label_gradient, probabilities[at_labels])
    return normalizer - expected_logits, probabilities


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
    label_smoothing: float = 0.0,
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
        label_smoothing: Share of each label that is spread over the true vocabulary.

    Returns:
        FP32 scalar, the same on all ranks of the group.

    Collective: the tensor-parallel group.
    """
    num_held = max(0, min(num_true, weight.shape[0]))
    vocabulary = Vocabulary(first_token, num_held, group, first_token + num_true, label_smoothing)
    if not torch.is_grad_enabled():  # what `forward` cannot see: it is never enabled there
        layer, weights = OutputLayer(weight, bias, vocabulary), loss_mask.float()
        return (_sweep(hidden, layer, labels, weights, None) * weights).sum(dtype=torch.float64).float()
    result: Tensor = _LinearCrossEntropy.apply(hidden, weight, bias, vocabulary, labels, loss_mask.float())
    return result


def linear_token_losses(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    first_token: int,
    num_true: int,
    group: dist.ProcessGroup | None,
) -> Tensor:
    """Return the cross entropy of each token; the backward pass takes any weights of them.

    Args:
        hidden: As for `linear_cross_entropy`, and so are the others.
        weight: [v/tp, h].
        labels: [n].
        bias: [v/tp].
        first_token: Token id of the first row.
        num_true: True vocabulary size less `first_token`.
        group: Tensor-parallel ranks, None where there is one.

    Returns:
        FP32 [n], the same on all ranks of the group.

    Collective: the tensor-parallel group, in the backward pass too.
    """
    num_held = max(0, min(num_true, weight.shape[0]))
    vocabulary = Vocabulary(first_token, num_held, group, first_token + num_true)
    result: Tensor = _LinearTokenLosses.apply(hidden, weight, bias, vocabulary, labels)
    return result
