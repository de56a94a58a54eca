"""The most probable tokens of a vocabulary that is sharded, without all logits at a time."""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

_ROWS = 256


def top_log_probabilities(
    hidden: Tensor,
    weight: Tensor,
    *,
    top_k: int,
    temperature: float,
    first_token: int,
    num_true: int,
    group: dist.ProcessGroup | None,
) -> tuple[Tensor, Tensor]:
    """Return the most probable tokens after each hidden state, and what is left for all others.

    Args:
        hidden: Last hidden states, [n, h], the same on all tensor-parallel ranks.
        weight: This rank's rows of the output layer, [v/tp, h].
        top_k: How many tokens; at most the vocabulary.
        temperature: What logits are divided by.
        first_token: Token id of the first row.
        num_true: True vocabulary size less `first_token`.
        group: Tensor-parallel ranks, None where there is one.

    Returns:
        Ids [n, k], and FP32 logarithms of their probabilities, then of all others together, [n, k + 1].

    Collective: the tensor-parallel group.
    """
    num_held = max(0, min(num_true, weight.shape[0]))
    found = []
    for start in range(0, len(hidden), _ROWS):
        logits = (hidden[start : start + _ROWS] @ weight.t()).float()[:, :num_held] / temperature
        best, columns = logits.topk(min(top_k, num_held), dim=1)
        missing = (0, top_k - best.shape[1])  # all ranks give as many, even those with fewer tokens
        best = _gathered(functional.pad(best, missing, value=-torch.inf), group)
        ids = _gathered(functional.pad(columns + first_token, missing), group)
        kept, places = best.topk(top_k, dim=1)
        ids = ids.gather(1, places)
        own = ids - first_token
        own = own.where((own >= 0) & (own < num_held), num_held)
        others = functional.pad(logits, (0, 1)).scatter_(1, own, -torch.inf)[:, :num_held]
        rest = _gathered(others.logsumexp(1, keepdim=True), group).logsumexp(1, keepdim=True)
        logps = torch.cat((kept, rest), 1)
        found.append((ids, logps - logps.logsumexp(1, keepdim=True)))
    all_ids, all_logps = zip(*found, strict=True)
    return torch.cat(all_ids), torch.cat(all_logps)


def _gathered(mine: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Return the columns of all ranks side by side."""
    if group is None:
        return mine
    of_ranks = [torch.empty_like(mine) for _ in range(group.size())]
    dist.all_gather(of_ranks, mine.contiguous(), group=group)
    return torch.cat(of_ranks, 1)
