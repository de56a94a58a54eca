"""What the engine asks of a model: forward passes over rows of a cache, and integers that all ranks agree on."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor, nn

from megatron_7b.generation.requests import GenerationRequest

TOKENS_AHEAD = 256
"""Room that a cache has for new tokens at first: a text may end long before it has all that it may have."""


class ModelRunner(ABC):
    """Runs this rank's part of a model; a kind of model that can generate has a class of its own.

    While a runner is open, the model computes on the runner's cache; `close` restores it.

    Args:
        model: This rank's only chunk.
        groups: megatron-core's process groups.
        has_logits: Whether this rank's part of the model ends with logits.

    Attributes:
        device: Where the model is.
    """

    def __init__(self, model: nn.Module, groups: ProcessGroupCollection, *, has_logits: bool) -> None:
        self._groups = groups
        self.device = next(model.parameters()).device
        self.chooses = has_logits and int(groups.tp.rank()) == 0
        """Whether this is the one rank of the model that chooses tokens: the first tensor rank of the last stage."""

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Tokens that the model knows."""

    @abstractmethod
    def context_of(self, prompt_ids: Sequence[int]) -> tuple[int, ...]:
        """Return the tokens that a text begins with: the prompt, or what a decoder begins with."""

    @abstractmethod
    def positions_of(self, requests: Iterable[GenerationRequest]) -> int:
        """Return the positions that a row must have in the end, whichever of the texts it gets."""

    @property
    @abstractmethod
    def num_cached(self) -> int:
        """Tokens that the cache has room for, all rows together."""

    @abstractmethod
    def tokens_within(self, max_bytes: int) -> int:
        """Return how many tokens of the cache fit into this much memory of this rank, resizing included."""

    @abstractmethod
    def reserve(self, num_rows: int, texts: Iterable[tuple[GenerationRequest, int]]) -> None:
        """Make room in the cache for this many rows, each of which may get any of the texts; it grows with them.

        Until the next call, the cache never becomes larger than it is now or than these rows times `positions_of` the
        texts, whichever is more.

        Args:
            num_rows: Rows of all texts, running and new.
            texts: All of them: what was asked, and how many tokens are in the cache.
        """

    @abstractmethod
    def read(self, prompts: Sequence[Sequence[int]], first_row: int, starts: Sequence[int]) -> Tensor | None:
        """Read prompts into rows [first_row, first_row + b) of the cache.

        Args:
            prompts: What is to be in the rows; those with the least left to be read come first.
            first_row: Of the first prompt.
            starts: How many tokens of each are in its row already, [b]; none where prompts are read as a whole.

        Returns:
            Logits of the first new tokens, [b, v] with masked padding on the ranks of the last stage, else None.

        **Collective:** all ranks that hold the model.
        """

    @abstractmethod
    def advance(self, tokens: Sequence[int], positions: Sequence[int]) -> Tensor | None:
        """Append a token to each of the rows [0, b) of the cache.

        Args:
            tokens: Of each row, [b].
            positions: Where they stand, [b].

        Returns:
            Logits of the next tokens, as `read` gives them.

        **Collective:** all ranks that hold the model.
        """

    @abstractmethod
    def copy_rows(self, copies: Sequence[tuple[int, int]], positions: slice) -> None:
        """Copy positions of rows of the cache to others, as `KeyValueCache.copy_rows`; from 0 on also the prompt's."""

    @abstractmethod
    def close(self) -> None:
        """Restore the model. Collective: none."""

    def least(self, value: int) -> int:
        """Return the smallest of all ranks' values. Collective: all ranks that built a runner."""
        if dist.get_world_size() == 1:
            return value
        shared = torch.tensor(value, dtype=torch.int64, device=self.device)
        dist.all_reduce(shared, dist.ReduceOp.MIN)
        return int(shared)

    def share(self, values: Sequence[int] | None, num_values: int) -> list[int]:
        """Tell all ranks what one of them has chosen.

        Args:
            values: On the rank that chooses, else None.
            num_values: How many there are.

        **Collective:** all ranks that hold the model.
        """
        if self._groups.mp.size() == 1:
            assert values is not None
            return list(values)
        shared = torch.zeros(num_values, dtype=torch.int64, device=self.device)
        if values is not None:
            shared.copy_(torch.tensor(values))
        self.share_tensor(shared)
        answer: list[int] = shared.tolist()
        return answer

    def share_tensor(self, values: Tensor) -> None:
        """Overwrite a tensor, of one shape on all ranks, with that of the rank that chooses.

        **Collective:** all ranks that hold the model.
        """
        group = self._groups.mp
        if group.size() > 1:
            # Ranks of a model are ordered by stage, then by tensor rank: the choosing one begins the last stage.
            dist.broadcast(values, group=group, group_src=group.size() - self._groups.tp.size())
