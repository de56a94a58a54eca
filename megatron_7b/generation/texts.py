"""Texts in progress: which rows of a batch they have, and what becomes of them with the next tokens.

Tokens are chosen in two steps, so that all ranks take the same way: the rank that holds the logits turns them into a
few integers, which it tells the others, and every rank draws the same conclusions from those.
"""

import struct
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from megatron_7b.generation.beams import BeamSearch, Candidate, assign_rows
from megatron_7b.generation.options import BeamOptions, SamplingOptions
from megatron_7b.generation.requests import (
    FinishedSearch,
    FinishReason,
    GeneratedToken,
    GenerationRequest,
    TokenLogprobs,
)
from megatron_7b.generation.requests import GenerationEvent as Event
from megatron_7b.generation.sampling import TokenSampler, penalize


class RunningText(ABC):
    """A text that is being continued, in one row of the batch or several.

    Attributes:
        number: What `GenerationEngine.submit` returned.
        request: What was asked.
        rows: Its rows of the cache.
        length: Tokens of each that are in the cache.
        num_shared_tokens: How many of them all rows have in common: what the text begins with.
        num_reused: How many tokens of its prompt an earlier text has read.
        last_tokens: The newest token of each row, not in the cache yet.
        is_done: Nothing follows.
    """

    def __init__(self, number: int, request: GenerationRequest) -> None:
        self.number = number
        self.request = request
        self.rows: list[int] = []
        self.length = self.num_shared_tokens = self.num_reused = 0
        self.last_tokens: list[int] = []
        self.is_done = False

    @property
    @abstractmethod
    def num_values(self) -> int:
        """How many integers `choose` returns."""

    @property
    def shared_ids(self) -> Sequence[int]:
        """Tokens that are in the cache in all its rows."""
        return self.request.prompt_ids

    @property
    def takes_most_probable(self) -> bool:
        """Whether what `choose` returns is the one token of the largest logit."""
        return False

    @abstractmethod
    def choose(self, logits: Tensor) -> list[int]:
        """Choose what follows.

        Args:
            logits: Of each row, or of the prompt at first [b, v].
        """

    @abstractmethod
    def accept(self, values: Sequence[int]) -> tuple[Event | None, list[tuple[int, int]]]:
        """Continue by what was chosen.

        Returns:
            What a caller learns, and which rows of the cache have to be copied, as (source, target).
        """

    def _is_forced(self, num_new: int) -> bool:
        """Whether the token after `num_new` ones is the one that the request names."""
        return self.request.forced_last_id is not None and num_new == self.request.max_new_tokens - 1


class SampledText(RunningText):
    """A text whose tokens are drawn one by one; one integer is its next token.

    Args:
        number: Of the request.
        request: With `SamplingOptions`.
        context: Tokens that the text has already, for a repetition penalty.
        stop_ids: Tokens of which each ends it.
    """

    def __init__(
        self, number: int, request: GenerationRequest, context: Sequence[int], stop_ids: Collection[int]
    ) -> None:
        super().__init__(number, request)
        assert isinstance(request.decoding, SamplingOptions)
        self._sampler = TokenSampler(
            request.decoding, request.sample_index, context, stop_ids=stop_ids, grammar=request.grammar
        )
        self._stop_ids = stop_ids
        self._new_ids: list[int] = []
        self._num_reported = request.decoding.logprobs

    @property
    def shared_ids(self) -> Sequence[int]:
        """All of its tokens but the newest."""
        return (*self.request.prompt_ids, *self._new_ids[:-1])

    @property
    def num_values(self) -> int:
        """A token; its log probability, and tokens and log probabilities of the most probable ones, if asked for."""
        return 1 if self._num_reported is None else 2 + 2 * self._num_reported

    @property
    def takes_most_probable(self) -> bool:
        """Whether nothing else is asked: no chance, penalty, grammar, last token or log probability."""
        return self._sampler.is_plain and self._num_reported is None and not self._is_forced(len(self._new_ids))

    def choose(self, logits: Tensor) -> list[int]:
        """Draw a token."""
        forced = self.request.forced_last_id
        is_forced = forced is not None and self._is_forced(len(self._new_ids))
        token = forced if forced is not None and is_forced else self._sampler.choose(logits[0])
        if self._num_reported is None:
            return [token]
        logprobs = logits[0].float().log_softmax(-1)
        top, ids = logprobs.topk(self._num_reported)
        return [token, *map(_bits_of, [float(logprobs[token]), *top.tolist()]), *ids.tolist()]

    def accept(self, values: Sequence[int]) -> tuple[Event, list[tuple[int, int]]]:
        """Append the token."""
        token_id, *reported = values
        self.last_tokens = [token_id]
        self._new_ids.append(token_id)
        reason: FinishReason | None = None
        if token_id in self._stop_ids:
            reason = "eod"
        elif len(self._new_ids) == self.request.max_new_tokens:
            reason = "length"
        self.is_done = reason is not None
        logprobs = None
        if self._num_reported is not None:
            own, *top = map(_number_of, reported[: 1 + self._num_reported])
            logprobs = TokenLogprobs(own, tuple(zip(reported[1 + self._num_reported :], top, strict=True)))
        return GeneratedToken(self.number, token_id, reason, logprobs, self.num_reused), []


class SearchedText(RunningText):
    """A text that beam search looks for; its integers are the scores, parents and tokens of the best candidates.

    Args:
        number: Of the request.
        request: With `BeamOptions`.
        context: Tokens that the text has already, for a repetition penalty.
        stop_ids: Tokens of which each ends it.
        vocab_size: Columns of the logits that are tokens.
    """

    def __init__(
        self,
        number: int,
        request: GenerationRequest,
        context: Sequence[int],
        stop_ids: Collection[int],
        vocab_size: int,
    ) -> None:
        super().__init__(number, request)
        assert isinstance(request.decoding, BeamOptions)
        self._options = request.decoding
        self._search = BeamSearch(request.decoding, request.max_new_tokens, stop_ids)
        self._context = tuple(context)
        self._vocab_size = vocab_size

    @property
    def num_values(self) -> int:
        """A score, a parent and a token for each candidate."""
        return 3 * self._search.num_candidates

    def choose(self, logits: Tensor) -> list[int]:
        """Find the best candidates."""
        beams = self._search.beams
        scores = logits[:, : self._vocab_size].float().log_softmax(-1)
        if self._options.repetition_penalty != 1.0:
            rows = zip(scores, beams, strict=True)
            scores = torch.stack([self._penalized(row, beam.token_ids) for row, beam in rows])
        if self._is_forced(len(beams[0].token_ids)):
            scores = torch.full_like(scores, -torch.inf)
            scores[:, self.request.forced_last_id] = 0.0
        scores = scores + scores.new_tensor([beam.score for beam in beams])[:, None]
        best, flat = scores.flatten().topk(self._search.num_candidates)
        parents, tokens = flat // self._vocab_size, flat % self._vocab_size
        return [*map(_bits_of, best.tolist()), *parents.tolist(), *tokens.tolist()]

    def accept(self, values: Sequence[int]) -> tuple[Event | None, list[tuple[int, int]]]:
        """Let the best beams continue in the rows of those that end."""
        count = self._search.num_candidates
        scores = list(map(_number_of, values[:count]))
        candidates = map(Candidate, scores, values[count : 2 * count], values[2 * count :])
        self._search.advance(list(candidates))
        self.is_done = self._search.is_done
        if self.is_done:
            best = self._search.hypotheses[: self._options.num_return_sequences]
            return FinishedSearch(self.number, tuple(best)), []
        beams = self._search.beams
        self.rows, copies = assign_rows(self.rows, [beam.parent for beam in beams])
        self.last_tokens = [beam.token_ids[-1] for beam in beams]
        return None, copies

    def _penalized(self, scores: Tensor, new_ids: Sequence[int]) -> Tensor:
        ids = torch.tensor(list({*self._context, *new_ids}), device=scores.device)
        return penalize(scores, ids, self._options.repetition_penalty)


def _bits_of(number: float) -> int:
    """Return a number as an integer that ranks can tell one another."""
    bits: int = struct.unpack("<q", struct.pack("<d", number))[0]
    return bits


def _number_of(bits: int) -> float:
    number: float = struct.unpack("<d", struct.pack("<q", bits))[0]
    return number
