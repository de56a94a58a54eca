"""Rounds on several ranks: the main rank, which has the web server, tells the others what all do next.

A rank that waits for news waits in a collective, which must not time out however long nobody asks for anything, and
must notice when another rank is gone: so the main rank announces a rest every few seconds, which all ranks answer.
"""

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

from megatron_7b.parallel.groups import new_background_group
from megatron_7b.serving.models import EmbeddingModel, LabellingModel, Model, WritingModel
from megatron_7b.serving.rounds import Round

REST_SECONDS = 5.0
"""How often the main rank announces itself while nothing is to be done: much less than collectives wait."""


class RankLeader:
    """The models of a server on all ranks.

    Args:
        models: As this rank has them; in the same order everywhere.
        world_size: Number of ranks.
        is_main: Whether this is the rank that leads.
        timeout_minutes: How long a rank may be late.

    Collective: all ranks make one.
    """

    def __init__(
        self, models: Sequence[Model], *, world_size: int, is_main: bool, timeout_minutes: float = 10.0
    ) -> None:
        self.models = models
        self.world_size = world_size
        self._is_main = is_main
        # Over the CPU: on GPUs, a rank that waits for news would keep its device busy, and news are no tensors.
        self._group = new_background_group(timeout_minutes) if world_size > 1 else None

    def follow(self) -> None:
        """Do what the main rank announces, on all other ranks, until it ends. Collective: all ranks."""
        assert not self._is_main
        while True:
            current = self._announced(None)
            self._do(current)
            if current.task == "end":
                return

    def lead(self, next_round: Round) -> Any:
        """Have all ranks do something; returns what came of it. On the main rank. Collective: all ranks."""
        assert self._is_main
        self._announced(next_round)
        return self._do(next_round)

    def _announced(self, news: Round | None) -> Round:
        if self._group is None:
            assert news is not None
            return news
        told: list[Round | None] = [news]
        dist.broadcast_object_list(told, src=0, group=self._group)
        assert told[0] is not None
        return told[0]

    def _do(self, current: Round) -> Any:
        if current.task in ("rest", "end"):
            if self._group is not None:
                dist.barrier(self._group)
            return None
        model = self.models[current.model]
        if isinstance(model, WritingModel):
            model.prepare(current.grammars)
            return model.write(current.begins, current.drops)
        if isinstance(model, LabellingModel):
            return model.label(current.inputs)
        assert isinstance(model, EmbeddingModel)
        return model.embed(current.inputs)
