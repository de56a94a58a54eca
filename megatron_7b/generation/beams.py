"""Beam search over the next tokens of one text, as plain arithmetic: which beams continue, which texts are complete.

Candidates come from the rank that holds the logits. Given the same candidates, every rank arrives at the same beams.

Source: transformers 5.24, `GenerationMixin._beam_search`, whose texts and scores these are.
"""

import heapq
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from megatron_7b.errors import ConfigError
from megatron_7b.generation.options import BeamOptions
from megatron_7b.generation.requests import FinishReason, Hypothesis


@dataclass(frozen=True)
class Candidate:
    """A possible next token of one of the beams.

    Attributes:
        score: Sum of the log probabilities of the beam's tokens and of this one.
        parent: Which of the beams it continues.
        token_id: The token.
    """

    score: float
    parent: int
    token_id: int


@dataclass(frozen=True)
class Beam:
    """A text that is being continued.

    Attributes:
        token_ids: Its new tokens.
        score: Sum of their log probabilities.
        parent: Which of the beams before the last token it continues.
    """

    token_ids: tuple[int, ...] = ()
    score: float = 0.0
    parent: int = 0


def num_candidates(num_beams: int, num_stop_ids: int) -> int:
    """Return how many tokens a step considers: so many that `num_beams` of them do not end a text."""
    return num_beams * max(2, 1 + num_stop_ids)


def check_vocabulary(options: BeamOptions, num_stop_ids: int, vocab_size: int) -> None:
    """Check that a first step has as many candidates as it needs.

    Raises:
        ConfigError: The vocabulary is too small.
    """
    needed = num_candidates(options.num_beams, num_stop_ids)
    if needed > vocab_size:
        raise ConfigError(
            f"num_beams is {options.num_beams}, which needs a vocabulary of {needed} tokens; the model has {vocab_size}"
        )


class BeamSearch:
    """Finds probable continuations of one text.

    Args:
        options: How to look for them.
        max_new_tokens: All texts end here at the latest.
        stop_ids: Tokens of which each ends a text.

    Attributes:
        beams: What is continued, the best first: one beam at first, then `num_beams`.
        hypotheses: The best complete texts so far, the best first, at most `num_beams`.
        is_done: Nothing better is looked for.
    """

    def __init__(self, options: BeamOptions, max_new_tokens: int, stop_ids: Collection[int]) -> None:
        self.beams: list[Beam] = [Beam()]
        self.hypotheses: list[Hypothesis] = []
        self.is_done = False
        self._options = options
        self._max_new_tokens = max_new_tokens
        self._stop_ids = frozenset(stop_ids)

    @property
    def num_candidates(self) -> int:
        """How many candidates `advance` needs."""
        return num_candidates(self._options.num_beams, len(self._stop_ids))

    def advance(self, candidates: Sequence[Candidate]) -> None:
        """Continue by one token.

        Args:
            candidates: The best `num_candidates` of all tokens of all beams, the best first.
        """
        num_beams = self._options.num_beams
        length = len(self.beams[0].token_ids) + 1
        is_last = length == self._max_new_tokens
        for rank, candidate in enumerate(candidates):
            if rank < num_beams and (is_last or candidate.token_id in self._stop_ids):
                self._complete(candidate, length)
        self.beams = [
            Beam((*self.beams[one.parent].token_ids, one.token_id), one.score, one.parent)
            for one in candidates
            if one.token_id not in self._stop_ids
        ][:num_beams]
        self.is_done = is_last or self._is_settled(length)

    def _complete(self, candidate: Candidate, length: int) -> None:
        """Keep a complete text, if it is among the best."""
        ids = (*self.beams[candidate.parent].token_ids, candidate.token_id)
        reason: FinishReason = "eod" if candidate.token_id in self._stop_ids else "length"
        complete = Hypothesis(ids, self._penalized(candidate.score, length), reason)
        self.hypotheses = heapq.nlargest(
            self._options.num_beams, [*self.hypotheses, complete], key=lambda hypothesis: hypothesis.score
        )

    def _is_settled(self, length: int) -> bool:
        """Whether there are enough complete texts, and no running one is expected to become better than the worst."""
        if len(self.hypotheses) < self._options.num_beams:
            return False
        if self._options.early_stopping is True:
            return True
        # Longer texts may score better if the penalty favors them: only "never" reckons with it.
        may_grow = self._options.early_stopping == "never" and self._options.length_penalty > 0
        best_length = self._max_new_tokens if may_grow else length
        return self._penalized(self.beams[0].score, best_length) <= self.hypotheses[-1].score

    def _penalized(self, score: float, length: int) -> float:
        return score / math.pow(length, self._options.length_penalty)


def assign_rows(rows: Sequence[int], parents: Sequence[int]) -> tuple[list[int], list[tuple[int, int]]]:
    """Give beams rows of a cache such that as few as possible have to be copied.

    Args:
        rows: The row of each beam before the last token.
        parents: Which of them each beam continues.

    Returns:
        The row of each beam now; and which rows to copy, as (source, target). No target is a source.
    """
    free = [row for beam, row in enumerate(rows) if beam not in parents]
    taken: set[int] = set()
    now, copies = [], []
    for parent in parents:
        row = rows[parent]
        if row in taken:
            copies.append((row, free.pop()))
            row = copies[-1][1]
        taken.add(row)
        now.append(row)
    return now, copies
