"""What preferences are learned with: losses of replies, given how probable a model finds them.

Source: DPO (Rafailov et al. 2023, eq. 7; with label smoothing, the conservative and the robust one: Mitchell 2023,
Chowdhury et al. 2024), hinge (Zhao et al. 2023, SLiC), IPO (Azar et al. 2023, eq. 17), ORPO (Hong et al. 2024, eq. 6),
KTO (Ethayarajh et al. 2024, eq. 8). Where papers leave it open, what is summed and what is averaged is as in trl 1.16.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from megatron_7b.config.finetune_config import FinetuneConfig


@dataclass(frozen=True)
class Replies:
    """The replies of a microbatch, two for each record.

    Attributes:
        logps: FP32 [n, 2], logarithm of how probable each reply is after its prompt; differentiable.
        lengths: FP32 [n, 2], tokens of each reply.
        reference: FP32 [n, 2], `logps` of the model that training starts from; None for orpo.
        is_desirable: [n], the labels of kto; None for pairs.
        nll: FP32 [n], sum of the losses of all tokens of each chosen reply and its prompt, for orpo; differentiable.
        nll_lengths: FP32 [n], how many tokens these are.
    """

    logps: Tensor
    lengths: Tensor
    reference: Tensor | None = None
    is_desirable: Tensor | None = None
    nll: Tensor | None = None
    nll_lengths: Tensor | None = None


@dataclass(frozen=True)
class PreferenceSums:
    """What a microbatch adds up to.

    Attributes:
        loss: Sum over its records; differentiable.
        reported: Sum and number by name, [2] each.
    """

    loss: Tensor
    reported: Mapping[str, Tensor]


def preference_sums(replies: Replies, options: FinetuneConfig) -> PreferenceSums:
    """Return the sums of `options.preference_loss`. Collective: none."""
    if options.preference_loss == "orpo":
        return _odds_ratio(replies, options.beta)
    if options.preference_loss == "kto":
        return _prospect(replies, options)
    return _direct(replies, options)


def _direct(replies: Replies, options: FinetuneConfig) -> PreferenceSums:
    """Compare how much more probable each reply of a pair has become."""
    assert replies.reference is not None
    beta, smoothing = options.beta, options.label_smoothing
    gains = replies.logps - replies.reference
    margins = beta * (gains[:, 0] - gains[:, 1])
    match options.preference_loss:
        case "hinge":
            losses = torch.relu(1 - margins)
        case "ipo":
            per_token = gains / replies.lengths.clamp(min=1)
            losses = (per_token[:, 0] - per_token[:, 1] - 1 / (2 * beta)) ** 2
        case "robust":
            kept, flipped = functional.logsigmoid(margins), functional.logsigmoid(-margins)
            losses = (smoothing * flipped - (1 - smoothing) * kept) / (1 - 2 * smoothing)
        case _:
            losses = -functional.logsigmoid(margins)
            if smoothing:
                losses = (1 - smoothing) * losses - smoothing * functional.logsigmoid(-margins)
    return PreferenceSums(losses.sum(), _of_pairs(beta * gains, replies.logps))


def _odds_ratio(replies: Replies, beta: float) -> PreferenceSums:
    """Learn the chosen reply, and prefer it; probabilities are those of a token on average.

    The first part is the mean over the tokens of the microbatch, prompts included.
    """
    assert replies.nll is not None
    assert replies.nll_lengths is not None
    logps = replies.logps / replies.lengths.clamp(min=1)
    odds = logps - _log_of_the_rest(logps)
    log_odds = odds[:, 0] - odds[:, 1]
    ratio = functional.logsigmoid(log_odds)
    nll = replies.nll.sum() / replies.nll_lengths.sum().clamp(min=1)
    reported = dict(_of_pairs(beta * logps, logps))
    for name, values in (
        ("nll_loss", nll.expand(len(ratio))),
        ("log_odds_ratio", ratio),
        ("log_odds_chosen", log_odds),
    ):
        reported[name] = _sum_of(values)
    return PreferenceSums(len(ratio) * nll - beta * ratio.sum(), reported)


def _prospect(replies: Replies, options: FinetuneConfig) -> PreferenceSums:
    """Make each reply more or less probable, as it is wanted or not, against how far the model has moved on average.

    That is estimated from the second replies, which belong to other prompts, of all records of the microbatch.
    """
    assert replies.reference is not None
    assert replies.is_desirable is not None
    gains = replies.logps - replies.reference
    moved = gains[:, 1].detach().mean().clamp(min=0) if len(gains) else gains.new_zeros(())
    wanted, own = replies.is_desirable, gains[:, 0]
    weights = torch.where(wanted, options.desirable_weight, options.undesirable_weight)
    sign = torch.where(wanted, 1.0, -1.0)
    losses = weights * (1 - torch.sigmoid(options.beta * sign * (own - moved)))
    rewards, logps = options.beta * own, replies.logps[:, 0]
    reported = {
        "rewards/chosen": _sum_of(rewards[wanted]),
        "rewards/rejected": _sum_of(rewards[~wanted]),
        "logps/chosen": _sum_of(logps[wanted]),
        "logps/rejected": _sum_of(logps[~wanted]),
        "kl": _sum_of(moved.expand(len(own))),
    }
    return PreferenceSums(losses.sum(), reported)


def _of_pairs(rewards: Tensor, logps: Tensor) -> Mapping[str, Tensor]:
    """Return what is reported of pairs, given their rewards and logarithms of probabilities, [n, 2] each."""
    margins = rewards[:, 0] - rewards[:, 1]
    values = {
        "rewards/accuracies": margins > 0,
        "rewards/margins": margins,
        "rewards/chosen": rewards[:, 0],
        "rewards/rejected": rewards[:, 1],
        "logps/chosen": logps[:, 0],
        "logps/rejected": logps[:, 1],
    }
    return {name: _sum_of(value) for name, value in values.items()}


def _sum_of(values: Tensor) -> Tensor:
    """Return sum and number of values, FP64 [2]."""
    total = values.detach().double().sum()
    return torch.stack((total, torch.full_like(total, len(values))))


def _log_of_the_rest(logps: Tensor) -> Tensor:
    """Return log(1 - exp(x)), by the one of two ways that loses no digits.

    Source: Mächler 2012, "Accurately computing log(1 - exp(-|a|))".
    """
    near_one = logps > -math.log(2)
    # Each way sees only values that it is made for: the gradient of the other would be infinite, and spoil the sum.
    close, far = torch.where(near_one, logps, -math.log(2)), torch.where(near_one, -math.log(2), logps)
    return torch.where(near_one, torch.log(-torch.expm1(close)), torch.log1p(-torch.exp(far)))
