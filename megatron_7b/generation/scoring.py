"""How likely a model finds given continuations of given texts: what evaluations by multiple choice are made of.

Texts that begin alike are read once: they are taken in alphabetical order of their tokens, and each keeps in the cache
what it shares with the one before it. So the answers of a question share the question, and questions share the examples
that come before them; answers of one token cost nothing beyond their question. Several rows of the cache work through
stretches of that order side by side.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_7b.errors import ConfigError
from megatron_7b.generation.cache_room import CacheRoom
from megatron_7b.generation.decoder_runner import DecoderRunner
from megatron_7b.generation.score import Score, ScoreRequest

_LOGITS_AT_ONCE = 256
"""Positions whose logits are held at a time."""


@dataclass(frozen=True)
class _Text:
    """What is read for one or several requests, and where something of it is predicted.

    Attributes:
        ids: Context and continuation, but for the last token, which nothing follows.
        first: Position whose prediction is wanted first.
    """

    ids: tuple[int, ...]
    first: int


class Scorer:
    """Scores continuations with a decoder; its runner's cache must hold no running texts.

    **Collective:** all ranks that hold the model make the same calls.

    Args:
        runner: Of this rank's part of the model.
        max_batch_size: Texts that share a forward pass.
        max_length: Tokens of a text; of a longer one the last are read.
        room: What the cache may hold; None: as much as it is asked.
    """

    def __init__(
        self,
        runner: DecoderRunner,
        *,
        max_batch_size: int = 16,
        max_length: int | None = None,
        room: CacheRoom | None = None,
    ) -> None:
        self._runner = runner
        self._max_batch_size = max_batch_size
        self._max_length = max_length
        self._room = room
        self._most_positions = 0

    @torch.inference_mode()
    def score(self, requests: Sequence[ScoreRequest]) -> Iterator[tuple[int, Score]]:
        """Yield the position of each request and its score, as they come.

        A text of more than `max_length` tokens loses its beginning, so that context and continuation without its last
        token fit, as lm-evaluation-harness has it; a continuation that is longer by itself is refused.

        Raises:
            ConfigError: A continuation is too long, a token is unknown to the model, or the cache has no room.

        **Collective:** all ranks that hold the model, which take everything from the iterator.
        """
        texts = [self._text(request) for request in requests]
        of_text: dict[tuple[int, ...], list[int]] = {}
        for number, text in enumerate(texts):
            of_text.setdefault(text.ids, []).append(number)
        firsts = {ids: min(texts[number].first for number in numbers) for ids, numbers in of_text.items()}
        longest = max(map(len, of_text), default=0)
        num_lanes = self._max_batch_size
        if self._room is not None:
            num_lanes = self._room.reserve_lanes(longest, num_lanes)
        # What fills up a row may come after its end, by as much again as the longest text has.
        self._most_positions = longest if num_lanes == 1 else 2 * longest
        lanes = _lanes(sorted(of_text), num_lanes)
        before: list[tuple[int, ...]] = [()] * len(lanes)
        for step in range(max(map(len, lanes), default=0)):
            lanes = [lane for lane in lanes if step < len(lane)]  # the longer ones come first
            now = [lane[step] for lane in lanes]
            starts = [min(_shared(old, new), firsts[new]) for old, new in zip(before, now, strict=False)]
            hidden = self._read(now, starts)
            wanted = [
                (number, row, texts[number].first - starts[row], requests[number].continuation_ids)
                for row, ids in enumerate(now)
                for number in of_text[ids]
            ]
            yield from zip([number for number, *_ in wanted], self._scores(hidden, wanted), strict=True)
            before = now

    def _text(self, request: ScoreRequest) -> _Text:
        whole = (*request.context_ids, *request.continuation_ids)
        unknown = [token for token in whole if not 0 <= token < self._runner.vocab_size]
        if unknown:
            raise ConfigError(
                f"a text has token {unknown[0]}, but the model knows {self._runner.vocab_size} tokens",
                hint="the tokenizer is not the one that the model was trained with",
            )
        read = whole[:-1] if self._max_length is None else whole[:-1][-self._max_length :]
        first = len(read) - len(request.continuation_ids)
        if first < 0:
            raise ConfigError(
                f"a continuation has {len(request.continuation_ids)} tokens, and the model's context is "
                f"{self._max_length}",
                hint="cut it into windows",
            )
        return _Text(read, first)

    def _read(self, texts: Sequence[tuple[int, ...]], starts: Sequence[int]) -> Tensor | None:
        """Read what each row does not hold yet; returns hidden states [s, b, h] on the last stage."""
        fed = [ids[start:] for ids, start in zip(texts, starts, strict=True)]
        longest = max(map(len, fed))
        self._runner.make_room(len(texts), max(starts) + longest, self._most_positions)
        return self._runner.forward([[*ids, *[0] * (longest - len(ids))] for ids in fed], 0, starts)

    def _scores(
        self, hidden: Tensor | None, wanted: Sequence[tuple[int, int, int, tuple[int, ...]]]
    ) -> Iterator[Score]:
        """Return the scores of requests, each (number, row, place of its first prediction in the row, continuation)."""
        places = [(row, first + index) for _, row, first, ids in wanted for index in range(len(ids))]
        targets = [token for *_, ids in wanted for token in ids]
        found = torch.zeros(len(targets), 2, dtype=torch.float64, device=self._runner.device)
        if hidden is not None:
            rows, offsets = torch.tensor(places, device=hidden.device).unbind(1)
            of_tokens = torch.tensor(targets, device=hidden.device)
            for first in range(0, len(targets), _LOGITS_AT_ONCE):
                some = slice(first, first + _LOGITS_AT_ONCE)
                logits = self._runner.logits(hidden[offsets[some], rows[some]]).float()
                chosen = logits.gather(1, of_tokens[some, None])[:, 0]
                found[some, 0] = (chosen - logits.logsumexp(dim=1)).double()
                found[some, 1] = (logits.argmax(dim=1) == of_tokens[some]).double()
        self._runner.share_tensor(found)
        bounds = itertools.pairwise(itertools.accumulate((len(ids) for *_, ids in wanted), initial=0))
        for begin, end in bounds:
            yield Score(float(found[begin:end, 0].sum()), bool(found[begin:end, 1].all()))


def _lanes(texts: Sequence[tuple[int, ...]], num_lanes: int) -> list[list[tuple[int, ...]]]:
    """Cut the order of texts into stretches that have about as many texts, the longest stretch first."""
    num_lanes = min(num_lanes, len(texts))
    bounds = [len(texts) * lane // num_lanes for lane in range(num_lanes + 1)] if num_lanes else [0]
    lanes = [list(texts[begin:end]) for begin, end in itertools.pairwise(bounds)]
    return sorted(lanes, key=len, reverse=True)


def _shared(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    """Return how many tokens two texts begin with in common."""
    length = min(len(one), len(other))
    if one[:length] == other[:length]:
        return length
    low, high = 0, length  # the first `low` are alike, the first `high` are not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if one[:middle] == other[:middle] else (low, middle)
    return low
