"""The models that a server holds, as each rank has them: what is told to all ranks is done here."""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray

from megatron_7b.errors import ConfigError
from megatron_7b.evaluation.vectors import embed_texts
from megatron_7b.generation.grammars import Grammar
from megatron_7b.generation.samples import Piece, Sample
from megatron_7b.generation.session import Session
from megatron_7b.model.on_ranks import ModelOnRanks
from megatron_7b.prediction.predicting import predict_batch
from megatron_7b.prediction.tasks import PredictedTask
from megatron_7b.serving.rounds import Begin, News, Refused, Ticket, Written
from megatron_7b.tokenizer import Tokenizer


class WritingModel:
    """A model that writes texts.

    Args:
        session: Of this rank.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        self._of_ticket: dict[Ticket, list[Sample]] = {}
        self._place: dict[int, tuple[Ticket, int]] = {}  # of a sample, by its id
        self._beside_steps = ThreadPoolExecutor(1, thread_name_prefix="grammars")

    def prepare(self, grammars: Sequence[Grammar]) -> None:
        """Begin to make grammars ready where tokens are chosen; on the main rank, the web server's threads do it."""
        layout = self.session.layout
        if not layout.is_main and layout.tp_rank == 0 and layout.pp_rank == layout.pp_size - 1:
            for grammar in grammars:
                self._beside_steps.submit(self.session.setup.grammar_vocabulary.prepare, grammar)

    def write(self, begins: Sequence[Begin], drops: Sequence[Ticket]) -> list[News]:
        """Let texts join and leave, then continue all by a token.

        Returns:
            On the main rank what came of all copies; elsewhere what came of this one.

        Collective: all ranks.
        """
        news: list[News] = []
        for ticket in drops:
            self._drop(ticket)
        for begin in begins:
            if begin.copy == self.session.layout.dp_rank:
                news += self._begin(begin)
        pieces = self.session.step()
        news += [self._written(piece) for piece in pieces]
        for ticket in {one.ticket for one in news if isinstance(one, Written) and one.finish_reason is not None}:
            if all(sample.finish_reason is not None for sample in self._of_ticket[ticket]):
                self._drop(ticket)
        return self._gathered(news)

    def _begin(self, begin: Begin) -> list[News]:
        """Submit a prompt; whether it is refused is the same on all ranks of the copy."""
        try:
            samples = self.session.submit(begin.prompt, begin.options)
        except ConfigError as error:
            return [Refused(begin.ticket, str(error.args[0]), error.hint)]
        self._of_ticket[begin.ticket] = samples
        self._place |= {id(sample): (begin.ticket, index) for index, sample in enumerate(samples)}
        return []

    def _drop(self, ticket: Ticket) -> None:
        for sample in self._of_ticket.pop(ticket, ()):
            self.session.cancel(sample)
            del self._place[id(sample)]

    def _written(self, piece: Piece) -> Written:
        sample = piece.sample
        ticket, index = self._place[id(sample)]
        came = tuple(sample.token_ids[len(sample.token_ids) - piece.num_tokens :])
        logprobs = tuple(sample.logprobs[-piece.num_tokens :])
        return Written(ticket, index, piece.text, came, sample.finish_reason, logprobs, sample.num_reused)

    def _gathered(self, news: list[News]) -> list[News]:
        """Return on the main rank what all copies have written. Collective: all ranks."""
        layout = self.session.layout
        if layout.dp_size == 1:
            return news
        speaks = layout.tp_rank == 0 and layout.pp_rank == 0
        of_ranks: list[Any] | None = [None] * layout.world_size if layout.is_main else None
        dist.gather_object(news if speaks else None, of_ranks, dst=0)
        return [one for of_rank in of_ranks or () if of_rank for one in of_rank]


class LabellingModel:
    """A model with a head.

    Args:
        model: This rank's part.
        task: What its head is for.
    """

    def __init__(self, model: ModelOnRanks, task: PredictedTask) -> None:
        self.model = model
        self.task = task

    def label(self, records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Return a prediction for each record. Collective: all ranks."""
        return list(predict_batch(self.model, self.task, records))


class EmbeddingModel:
    """A model that gives texts vectors.

    Args:
        model: This rank's part.
        tokenizer: Of the model.
    """

    def __init__(self, model: ModelOnRanks, tokenizer: Tokenizer) -> None:
        self.model = model
        self.tokenizer = tokenizer

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return a vector of length 1 for each text, [texts, h]. Collective: all ranks."""
        return embed_texts(self.model, self.tokenizer, texts)


type Model = WritingModel | LabellingModel | EmbeddingModel
