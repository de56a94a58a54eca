"""Output layer, cross entropy and distance from a teacher in one, over a vocabulary that is sharded.

A few hundred tokens' logits of both models exist at a time, each rank's for its own part of the vocabulary. Ranks
exchange a few numbers per token: logarithms of normalizers, then sums over the vocabulary. As in `fused_loss`, the
gradients are computed in the forward pass.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from megatron_7b import upstream
from megatron_7b.config.distillation_config import DistillationConfig
from megatron_7b.model.fused_loss import Gradients, OutputLayer, Vocabulary
from megatron_7b.runtime.weight_gradients import stand_in

_CHUNK_BYTES = 16 << 20
"""Of FP32 logits of one model; about six tensors of this size exist at a time."""


@dataclass(frozen=True)
class Taught:
    """What a teacher says of the tokens of a microbatch, on the last pipeline stage.

    Attributes:
        hidden: What its output layer takes: [s, b, h] or [s/tp, b, h]; of an encoder that of the tokens which count,
            [n, h].
        weight: This rank's rows of its output layer, [v/tp, h].
        bias: Of the same, [v/tp], if there is one.
        how: How it is compared with.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    how: DistillationConfig


@dataclass(frozen=True)
class TopTaught:
    """The same from a file: the most probable tokens.

    Attributes:
        ids: [n, k].
        logps: FP32 logarithms of their probabilities, then of all other tokens together, [n, k + 1].
        how: How it is compared with; its temperature is that of the file.
    """

    ids: Tensor
    logps: Tensor
    how: DistillationConfig


class TaughtLosses(NamedTuple):
    """FP32 sums over the tokens of a microbatch, each times its mask."""

    loss: Tensor
    """(1 - alpha) * task + alpha * distance; the one that is differentiable."""
    task: Tensor
    """Cross entropies."""
    distance: Tensor
    """Distances from the teacher, times temperature²."""


class _Parts(NamedTuple):
    """Of each token and each entry of the vocabulary, [n, v/tp]."""

    terms: Tensor
    """What the distance is the sum of."""
    slopes: Tensor
    """Derivative of the distance by the logarithm of the student's probability."""


def _forward_kl(log_p: Tensor, log_q: Tensor, _beta: float) -> _Parts:
    """Return KL(p || q), of teacher p and student q."""
    p = log_p.exp()
    return _Parts((log_p - log_q).mul_(p), p.neg_())


def _reverse_kl(log_p: Tensor, log_q: Tensor, _beta: float) -> _Parts:
    """Return KL(q || p)."""
    q = log_q.exp()
    terms = (log_q - log_p).mul_(q)
    return _Parts(terms, q.add_(terms))


def _jsd(log_p: Tensor, log_q: Tensor, beta: float) -> _Parts:
    """Return beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q.

    Source: Agarwal et al. 2024 (generalized knowledge distillation), eq. 1.
    """
    of_p, of_q = torch.tensor((beta, 1 - beta), dtype=torch.float64).log().tolist()
    log_m = torch.logaddexp(log_p + of_p, log_q + of_q)
    slopes = (log_q - log_m).mul_(log_q.exp()).mul_(1 - beta)
    return _Parts((log_p - log_m).mul_(log_p.exp()).mul_(beta).add_(slopes), slopes)


_DISTANCES: dict[str, Callable[[Tensor, Tensor, float], _Parts]] = {
    "forward_kl": _forward_kl,
    "reverse_kl": _reverse_kl,
    "jsd": _jsd,
}


def distances(student: Tensor, teacher: Tensor, how: DistillationConfig) -> Tensor:
    """Return the distances of few logits, with gradients by the student's.

    Args:
        student: FP32 logits of distributions, [..., v].
        teacher: Those of the teacher, [..., v].
        how: How they are compared.

    Returns:
        Of each distribution, times temperature², [...].
    """
    log_q = functional.log_softmax(student / how.temperature, dim=-1)
    log_p = functional.log_softmax(teacher / how.temperature, dim=-1)
    with torch.no_grad():
        terms, slopes = _DISTANCES[how.loss](log_p, log_q, how.jsd_beta)
    # What is added is zero, and has the gradient of the distance by the logarithms of the student's probabilities.
    values = terms.sum(-1) + (slopes * (log_q - log_q.detach())).sum(-1)
    return values * how.temperature**2


class _Judged(NamedTuple):
    """Of each token of a chunk."""

    task: Tensor
    """[n]."""
    distance: Tensor
    """[n], times temperature²."""
    gradient: Tensor
    """Of the weighted loss by the student's logits, [n, v/tp]."""


def _judge(
    student: Tensor,
    teacher: Tensor | TopTaught,
    labels: Tensor,
    weights: Tensor,
    vocabulary: Vocabulary,
    how: DistillationConfig,
) -> _Judged:
    """Compare the student's logits with the teacher's, FP32 [n, v/tp] each, or with what is kept of them.

    All tokens that are not kept are one outcome, which is the same as if the teacher divided their probability among
    them as the student does: every distance here is a sum of terms that depend on p/q alone, times p or q.

    Collective: the tensor-parallel group.
    """
    group, tau, num_true = vocabulary.group, how.temperature, vocabulary.num_true
    whole = torch.zeros_like(student) if num_true < student.shape[1] else None
    student = student[:, :num_true]
    labels = labels - vocabulary.first_token
    held = ((labels >= 0) & (labels < num_true)).unsqueeze(1)
    index = torch.where(held, labels.unsqueeze(1), 0)
    label_logits = torch.where(held, student.gather(1, index), 0.0) if num_true else torch.zeros_like(weights)[:, None]
    log_q = student / tau
    if isinstance(teacher, TopTaught):
        columns = _columns(teacher.ids, vocabulary)
        third = functional.pad(log_q, (0, 1)).scatter_(1, columns, -torch.inf)[:, :num_true].logsumexp(1)
    else:
        log_p = teacher[:, :num_true] / tau
        third = log_p.logsumexp(1)
    own = torch.stack(
        (student.logsumexp(1), log_q.logsumexp(1), third, label_logits.squeeze(1))
    )  # [4, n], of this rank's part of the vocabulary
    if group is not None:
        of_ranks = own.new_empty(group.size(), *own.shape)
        dist.all_gather(list(of_ranks), own, group=group)
        own = torch.cat((of_ranks[:, :3].logsumexp(0), of_ranks[:, 3:].sum(0)))
    normalizer, of_student, third, label_logit = own
    log_q.sub_(of_student.unsqueeze(1))
    if isinstance(teacher, TopTaught):
        rest = teacher.logps[:, -1] - (third - of_student)
        log_p = functional.pad(log_q + rest.unsqueeze(1), (0, 1))
        log_p = log_p.scatter_(1, columns, teacher.logps[:, :-1])[:, :num_true]
    else:
        log_p.sub_(third.unsqueeze(1))
    terms, slopes = _DISTANCES[how.loss](log_p, log_q, how.jsd_beta)
    sums = torch.stack((terms.sum(1), slopes.sum(1)))
    if group is not None:
        dist.all_reduce(sums, group=group)
    # Of the distance by logits: slope_j - q_j * (sum of slopes), times tau² of the loss, divided by tau of the logits.
    gradient = slopes.addcmul_(log_q.exp_(), sums[1].unsqueeze(1), value=-1).mul_(tau * how.alpha)
    if how.alpha < 1:
        of_task = student.sub_(normalizer.unsqueeze(1)).exp_()
        if num_true:
            of_label = torch.expm1(label_logit - normalizer).unsqueeze(1)
            of_task.scatter_(1, index, torch.where(held, of_label, of_task.gather(1, index)))
        gradient.add_(of_task, alpha=1 - how.alpha)
    gradient.mul_(weights.unsqueeze(1))
    if whole is not None:
        whole[:, :num_true] = gradient
    return _Judged(normalizer - label_logit, sums[0].mul(tau * tau), gradient if whole is None else whole)


def _columns(ids: Tensor, vocabulary: Vocabulary) -> Tensor:
    """Return the columns of tokens among this rank's; those of other ranks' tokens are one beyond the last."""
    columns = ids - vocabulary.first_token
    return columns.where((columns >= 0) & (columns < vocabulary.num_true), vocabulary.num_true)


def _sweep(
    hidden: Tensor,
    layer: OutputLayer,
    taught: Taught | TopTaught,
    labels: Tensor,
    mask: Tensor,
    gradients: Gradients | None,
) -> TaughtLosses:
    """Return the sums over all tokens; the gradients of the loss are added to `gradients`."""
    sums, how = torch.zeros(2, dtype=torch.float64, device=hidden.device), taught.how
    rows = max(1, _CHUNK_BYTES // (4 * layer.weight.shape[0]))
    for start in range(0, hidden.shape[0], rows):
        part = slice(start, start + rows)
        student = functional.linear(hidden[part], layer.weight, layer.bias).float()
        if isinstance(taught, TopTaught):
            teacher: Tensor | TopTaught = TopTaught(taught.ids[part], taught.logps[part], how)
        else:
            teacher = functional.linear(taught.hidden[part], taught.weight, taught.bias).float()
        judged = _judge(student, teacher, labels[part], mask[part], layer.vocabulary, how)
        sums += torch.stack(((judged.task * mask[part]).sum(), (judged.distance * mask[part]).sum()))
        if gradients is not None:
            gradients.add(part, hidden[part], judged.gradient, layer)
    task, distance = sums.float()
    return TaughtLosses(((1 - how.alpha) * sums[0] + how.alpha * sums[1]).float(), task, distance)


class _LinearDistillation(torch.autograd.Function):
    """Sums of task loss and distance of `hidden @ weight.T + bias`; the gradient is that of the loss made of both."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        taught: Taught | TopTaught,
        vocabulary: Vocabulary,
        labels: Tensor,
        mask: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        layer, gradients = OutputLayer(weight, bias, vocabulary), None
        if any(ctx.needs_input_grad):
            gradients = Gradients.build(hidden, layer, is_trained=ctx.needs_input_grad[1])
            ctx.layer, ctx.in_main_grad = layer, gradients.in_main_grad
        loss, task, distance = _sweep(hidden, layer, taught, labels, mask, gradients)
        if gradients is not None:
            ctx.save_for_backward(*gradients.by_inputs(layer))
        ctx.mark_non_differentiable(task, distance)
        return loss, task, distance

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, *_others: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight, grad_bias = ctx.saved_tensors
        if ctx.in_main_grad:
            upstream.assert_on_device(grad_output == 1.0, "the sum of the losses was scaled before its backward pass")
            grad_weight = stand_in(ctx.layer.weight)
        else:
            grad_weight = None if grad_weight is None else grad_weight.mul_(grad_output)
            grad_hidden = grad_hidden.mul_(grad_output)
        grad_bias = None if grad_bias is None else grad_bias * grad_output
        return grad_hidden, grad_weight, grad_bias, None, None, None, None


def linear_distillation(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    loss_mask: Tensor,
    taught: Taught | TopTaught,
    *,
    bias: Tensor | None = None,
    first_token: int,
    num_true: int,
    group: dist.ProcessGroup | None,
) -> TaughtLosses:
    """Return the sums of cross entropies and of distances from a teacher over all tokens that the mask keeps.

    Args:
        hidden: Last hidden states, [n, h], the same on all tensor-parallel ranks.
        weight: This rank's rows of the output layer, [v/tp, h].
        labels: Token ids, [n].
        loss_mask: Weight of each token, [n].
        taught: What the teacher says of the same tokens; its states are [n, h] here.
        bias: Of the output layer, [v/tp].
        first_token: Token id of the first row, of both models.
        num_true: True vocabulary size less `first_token`.
        group: Tensor-parallel ranks, None where there is one. The gradient of `hidden` is this rank's part: the caller
            sums it over the group.

    Returns:
        The same on all ranks of the group.

    Collective: the tensor-parallel group.
    """
    num_held = max(0, min(num_true, weight.shape[0]))
    vocabulary = Vocabulary(first_token, num_held, group, first_token + num_true)
    mask = loss_mask.float()
    if not torch.is_grad_enabled():  # what `forward` cannot see: it is never enabled there
        return _sweep(hidden, OutputLayer(weight, bias, vocabulary), taught, labels, mask, None)
    return TaughtLosses(*_LinearDistillation.apply(hidden, weight, bias, taught, vocabulary, labels, mask))
