"""From logits to a token, as pure functions: temperature, top-k, top-p, and a draw from one uniform number.

Everything is computed in FP64 on the CPU from one uniform number per token, so the text of a seed depends neither on
the device nor on what else is in the batch.
"""

import collections
import hashlib
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron_7b.generation.options import SamplingOptions

if TYPE_CHECKING:
    from megatron_7b.generation.grammars import Grammar, GrammarState, GrammarVocabulary


_BOUNDS = (-2.0, -4.0, -6.0, -8.0, -12.0, -16.0, -32.0)
"""Logits, less the largest, from which on tokens are looked at: a trained model has few near the largest, and sorting
them takes a hundredth of the time of sorting a vocabulary."""


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
    changed = torch.where(scores < 0, scores * penalty, scores / penalty)
    return logits.index_put((token_ids,), changed.clamp(max=torch.finfo(torch.float32).max))  # inf - inf is no number


def most_probable(logits: Tensor) -> list[int]:
    """Return the token of the largest logit of each row of [b, v]; of equal ones the first."""
    if logits.device.type == "cpu":  # NumPy's is ten times as fast as torch's
        logits = logits.float()
        return [int(row.numpy().argmax()) for row in logits]
    tokens: list[int] = logits.argmax(dim=-1).tolist()
    return tokens


def top_k_tokens(logits: Tensor, top_k: int) -> Tensor:
    """Return the tokens of the `top_k` largest logits; of equal ones those of lower ids.

    Args:
        logits: FP64 [v], the largest of which is 0.
        top_k: At least 1.

    Returns:
        int64 [top_k or v], the largest logit first.
    """
    bound = next((bound for bound in _BOUNDS if int((logits >= bound).sum()) >= top_k), None)
    return _tokens_from(logits, bound)[:top_k]


def top_p_tokens(logits: Tensor, top_p: float) -> Tensor:
    """Return the tokens of the smallest set of largest logits whose probabilities sum to at least `top_p`.

    Args:
        logits: FP64 [v], the largest of which is 0.
        top_p: Share of the probability, above 0.

    Returns:
        int64, at least one, the largest logit first.

    Source: nucleus sampling, arXiv:1904.09751.
    """
    shares = logits.softmax(-1)
    bound = next((bound for bound in _BOUNDS if float(shares[logits >= bound].sum()) >= top_p), None)
    tokens = _tokens_from(logits, bound)
    before = shares[tokens].cumsum(-1) - shares[tokens]
    return tokens[: max(1, int((before < top_p).sum()))]


def _tokens_from(logits: Tensor, bound: float | None) -> Tensor:
    """Return the tokens of all logits from a bound on, the largest first, equal ones by id; None: of all there are."""
    if bound is None:
        return logits.argsort(descending=True, stable=True)
    tokens = (logits >= bound).nonzero().squeeze(1)
    return tokens[logits[tokens].argsort(descending=True, stable=True)]


def token_probabilities(logits: Tensor, options: SamplingOptions) -> tuple[Tensor, Tensor]:
    """Return the tokens that the next one is drawn from, and their probabilities.

    Args:
        logits: [v] in any floating-point type, on the CPU.
        options: With a temperature above 0.

    Returns:
        Token ids in rising order, int64 [n], and FP64 [n], summing to 1.
    """
    logits = logits.double()
    # The largest becomes 0 first: no temperature, however small, makes it overflow.
    logits = (logits - logits.max()) / options.temperature
    tokens: Tensor | None = None
    if options.top_k is not None and options.top_k < logits.numel():
        tokens = top_k_tokens(logits, options.top_k)
    if options.top_p is not None and options.top_p < 1.0:
        tokens = (
            top_p_tokens(logits, options.top_p)
            if tokens is None
            else tokens[top_p_tokens(logits[tokens], options.top_p)]
        )
    if tokens is None:
        return torch.arange(logits.numel()), logits.softmax(-1)
    tokens = tokens.sort().values
    return tokens, logits[tokens].softmax(-1)


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
    # Whatever the numbers are, NaN of a damaged model included: a token beyond the last would end all other texts, too.
    return min(int(index), int(last), len(cumulative) - 1)


class TokenSampler:
    """Chooses the tokens of one request, one after the other.

    Args:
        options: How to choose.
        sample_index: Number of the sample of one prompt: each has its own stream of random numbers.
        prompt_ids: What the text begins with; only a repetition penalty asks.
        stop_ids: Tokens of which each ends the text.
        grammar: What the text must fit, and the tokens that it is made of.

    Attributes:
        options: How to choose.
        is_plain: It is always the most probable token.
    """

    def __init__(
        self,
        options: SamplingOptions,
        sample_index: int = 0,
        prompt_ids: Sequence[int] = (),
        *,
        stop_ids: Collection[int] = (),
        grammar: "tuple[GrammarVocabulary, Grammar] | None" = None,
    ) -> None:
        self.options = options
        self._repeated = dict.fromkeys(prompt_ids) if options.repetition_penalty != 1.0 else {}
        self._counts: collections.Counter[int] = collections.Counter()
        self._stop_ids = list(stop_ids)
        self._grammar = grammar
        self._state: GrammarState | None = None  # made by the rank that chooses
        self.is_plain = options.temperature == 0.0 and not self._changes_logits(options)
        digest = hashlib.blake2b(f"{options.seed}:{sample_index}".encode(), digest_size=8).digest()
        self._generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)

    def choose(self, logits: Tensor) -> int:
        """Return the next token.

        Args:
            logits: [v], padding of the vocabulary masked.

        Raises:
            ConfigError: The grammar cannot be followed any further.
        """
        if self.is_plain:
            return most_probable(logits[None])[0]
        chosen = self._choose(self._changed(logits.cpu()))
        self._counts[chosen] += 1
        if self.options.repetition_penalty != 1.0:
            self._repeated[chosen] = None
        if self._state is not None:
            self._state.accept(chosen)
        return chosen

    def _changes_logits(self, options: SamplingOptions) -> bool:
        penalties = options.repetition_penalty != 1.0 or options.presence_penalty or options.frequency_penalty
        return bool(penalties or options.logit_bias or options.min_new_tokens or self._grammar)

    def _changed(self, logits: Tensor) -> Tensor:
        """Return the logits after everything that makes tokens more or less probable, or impossible."""
        options = self.options
        if self._repeated:
            ids = torch.tensor(list(self._repeated), device=logits.device)
            logits = penalize(logits, ids, options.repetition_penalty)
        changes: dict[int, float] = dict(options.logit_bias)
        for token, count in self._counts.items():
            penalty = options.presence_penalty + options.frequency_penalty * count
            if penalty:
                changes[token] = changes.get(token, 0.0) - penalty
        if changes:
            ids, by = torch.tensor(list(changes)), torch.tensor(list(changes.values()))
            logits = logits.float().index_add(0, ids.to(logits.device), by.to(logits.device))
        if self._counts.total() < options.min_new_tokens and self._stop_ids:
            logits = logits.index_fill(0, torch.tensor(self._stop_ids, device=logits.device), -torch.inf)
        if self._grammar is not None:
            vocabulary, grammar = self._grammar
            self._state = self._state or vocabulary.follow(grammar)
            allowed = torch.from_numpy(self._state.allowed(logits.numel())).to(logits.device)
            logits = logits.masked_fill(~allowed, -torch.inf)
        return logits

    def _choose(self, logits: Tensor) -> int:
        if self.options.temperature == 0.0:
            return most_probable(logits[None])[0]
        uniform = torch.rand((), dtype=torch.float64, generator=self._generator).item()
        tokens, probabilities = token_probabilities(logits, self.options)
        return int(tokens[draw(probabilities, uniform)])
