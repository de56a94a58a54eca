"""From logits to a token, as pure functions: temperature, top-k, top-p, and a draw from one uniform number.

Everything is computed in FP64 on the CPU from one uniform number per token, so the text of a seed depends neither on
the device nor on what else is in the batch.
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_7b.generation.options import SamplingOptions


def penalize(logits: Tensor, token_ids: Tensor, penalty: float) -> Tensor:
    """Make tokens less probable.

    Args:
        logits: [v].
        token_ids: int64 [n], none twice.
        penalty: Above 1; below it makes them more probable.

    Returns:
        FP32 [v].

    Source: CTRL, arXiv:1909.05858, as transformers' RepetitionPenaltyLogitsProcessor computes it.
    """
    logits = logits.float()
    scores = logits[token_ids]
    return logits.index_put((token_ids,), torch.where(scores < 0, scores * penalty, scores / penalty))


def most_probable(logits: Tensor) -> int:
    """Return the token of the largest logit, [v]; of equal ones the first."""
    if logits.device.type == "cpu":  # NumPy's is ten times as fast as torch's
        return int(logits.float().numpy().argmax())
    return int(logits.argmax())


def keep_top_k(logits: Tensor, top_k: int) -> Tensor:
    """Set all but the `top_k` largest logits to -inf; of equal ones those of lower token ids stay.

    Args:
        logits: [v].
        top_k: How many stay, at least 1.

    Returns:
        [v].
    """
    order = logits.argsort(descending=True, stable=True)
    return logits.index_fill(0, order[top_k:], -torch.inf)


def keep_top_p(logits: Tensor, top_p: float) -> Tensor:
    """Set all logits to -inf but the smallest set of largest ones whose probabilities sum to at least `top_p`.

    Args:
        logits: [v].
        top_p: Share of the probability, above 0.

    Returns:
        [v]; at least one logit stays.

    Source: nucleus sampling, arXiv:1904.09751.
    """
    order = logits.argsort(descending=True, stable=True)
    probabilities = logits.double().softmax(-1)[order]
    before = probabilities.cumsum(-1) - probabilities
    is_dropped = before >= top_p
    is_dropped[0] = False
    return logits.index_fill(0, order[is_dropped], -torch.inf)


def token_probabilities(logits: Tensor, options: SamplingOptions) -> Tensor:
    """Return the distribution that the next token is drawn from.

    Args:
        logits: [v] in any floating-point type, on any device.
        options: With a temperature above 0.

    Returns:
        FP64 [v] on the CPU, summing to 1.
    """
    logits = logits.to("cpu", torch.float64)
    # The largest becomes 0 first: no temperature, however small, makes it overflow.
    logits = (logits - logits.max()) / options.temperature
    if options.top_k is not None and options.top_k < logits.numel():
        logits = keep_top_k(logits, options.top_k)
    if options.top_p is not None and options.top_p < 1.0:
        logits = keep_top_p(logits, options.top_p)
    return logits.softmax(-1)


def draw(probabilities: Tensor, uniform: float) -> int:
    """Return the token at which the cumulative distribution passes `uniform`.

    Args:
        probabilities: FP64 [v].
        uniform: In [0, 1).
    """
    cumulative = probabilities.cumsum(-1)
    # right=True finds the first sum above the target: a token of probability 0 raises no sum and is never found.
    index = torch.searchsorted(cumulative, uniform * cumulative[-1], right=True)
    # Rounding may make the product reach the total; the token that completes it is the first at which it is reached.
    last = torch.searchsorted(cumulative, cumulative[-1])
    return int(torch.minimum(index, last))


class TokenSampler:
    """Chooses the tokens of one request, one after the other.

    Args:
        options: How to choose.
        sample_index: Number of the sample of one prompt: each has its own stream of random numbers.
        prompt_ids: What the text begins with; only a repetition penalty asks.
    """

    def __init__(self, options: SamplingOptions, sample_index: int = 0, prompt_ids: Sequence[int] = ()) -> None:
        self.options = options
        self._penalized = dict.fromkeys(prompt_ids) if options.repetition_penalty != 1.0 else None
        digest = hashlib.blake2b(f"{options.seed}:{sample_index}".encode(), digest_size=8).digest()
        self._generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)

    def choose(self, logits: Tensor) -> int:
        """Return the next token.

        Args:
            logits: [v], padding of the vocabulary masked.
        """
        if self._penalized is None:
            return self._choose(logits)
        if self._penalized:
            ids = torch.tensor(list(self._penalized), device=logits.device)
            logits = penalize(logits, ids, self.options.repetition_penalty)
        chosen = self._choose(logits)
        self._penalized[chosen] = None
        return chosen

    def _choose(self, logits: Tensor) -> int:
        if self.options.temperature == 0.0:
            return most_probable(logits)
        uniform = torch.rand((), dtype=torch.float64, generator=self._generator).item()
        return draw(token_probabilities(logits, self.options), uniform)
