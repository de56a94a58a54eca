"""One forward pass through all pipeline stages, and the broadcast of the tokens drawn at the last one."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_7b.generation.cache import KeyValueCache, Placement, place
from megatron_7b.model.kinds.decoder.network import LanguageModel


class StageRunner:
    """Runs this rank's stage: receives hidden states from the previous stage and sends them to the next.

    Args:
        model: This rank's only chunk, whose attention works on the cache.
        cache: That cache.
    """

    def __init__(self, model: LanguageModel, cache: KeyValueCache) -> None:
        self._model = model
        self._cache = cache
        self._groups = model.pg_collection
        self._is_first = bool(model.pre_process)
        self._is_last = bool(model.post_process)
        self._parameter = next(model.parameters())
        self._angles = torch.empty(0)

    @property
    def draws_tokens(self) -> bool:
        """Whether this is the one rank of the model that draws: the first tensor rank of the last stage."""
        return self._is_last and int(self._groups.tp.rank()) == 0

    def forward(
        self, tokens: Sequence[Sequence[int]], first_row: int, starts: Sequence[int], *, last: Sequence[int]
    ) -> Tensor | None:
        """Append tokens to rows of the cache and compute what follows one of them.

        Args:
            tokens: [b][s] token ids, filled up at the end.
            first_row: Rows [first_row, first_row + b) of the cache.
            starts: Position of each row's first token, [b].
            last: Which token of each row is its last, [b], counted from the first of this pass.

        Returns:
            On the last stage the logits of the tokens that follow, [b, v] with masked padding; None on the others.

        **Collective:** all ranks that hold the model.
        """
        device = self._parameter.device
        placement = place(first_row, starts, len(tokens[0]), device)
        self._cache.begin(placement)
        hidden = self._hidden_states(torch.tensor(tokens, device=device), placement)
        if not self._is_last:
            dist.send(hidden, group=self._groups.pp, group_dst=self._groups.pp.rank() + 1)
            return None
        rows = torch.arange(len(last), device=device)
        return self.logits(hidden[torch.tensor(last, device=device), rows])

    def logits(self, hidden: Tensor) -> Tensor:
        """Apply the output layer.

        Args:
            hidden: [..., h], after the final norm.

        Returns:
            [..., v] over all tensor ranks' parts of the vocabulary, padding masked.

        **Collective:** the tensor-parallel group of the last stage.
        """
        model = self._model
        tied = model.share_embeddings_and_output_weights
        weight = model.shared_embedding_or_output_weight() if tied else None
        logits: Tensor = model.output_layer(hidden, weight=weight, runtime_gather_output=True)[0]
        model.mask_vocabulary_padding(logits)
        return logits

    def share_tokens(self, chosen: Sequence[int] | None, num_tokens: int) -> list[int]:
        """Broadcast the drawn tokens to all ranks.

        Args:
            chosen: [b] on the rank that draws, else None.
            num_tokens: b.

        **Collective:** all ranks that hold the model.
        """
        group = self._groups.mp
        if group.size() == 1:
            assert chosen is not None
            return list(chosen)
        tokens = torch.zeros(num_tokens, dtype=torch.int64, device=self._parameter.device)
        if chosen is not None:
            tokens.copy_(torch.tensor(chosen))
        # Ranks of a model are ordered by stage, then by tensor rank: the drawing one begins the last stage.
        dist.broadcast(tokens, group=group, group_src=group.size() - self._groups.tp.size())
        ids: list[int] = tokens.tolist()
        return ids

    def _hidden_states(self, tokens: Tensor, placement: Placement) -> Tensor:
        """Run the layers of this stage; returns [s, b, h]."""
        model = self._model
        hidden = None
        if self._is_first:
            hidden = model.embedding(input_ids=tokens, position_ids=placement.positions)
        else:
            b, s = tokens.shape
            received = self._parameter.new_empty(s, b, model.config.hidden_size)
            dist.recv(received, group=self._groups.pp, group_src=self._groups.pp.rank() - 1)
            model.set_input_tensor(received)
        output: Tensor = model.decoder(
            hidden_states=hidden, attention_mask=None, rotary_pos_emb=self._rotation(placement)
        )
        return output.contiguous()

    def _rotation(self, placement: Placement) -> Tensor | None:
        """Return the rotary angles of the tokens' own positions, [s, b, 1, d]; None: positions are embedded."""
        if self._model.position_embedding_type != "rope":
            return None
        if self._angles.shape[0] < placement.num_positions:
            length = max(placement.num_positions, 2 * self._angles.shape[0])
            self._angles = self._model.rotary_pos_emb.get_emb(length)[:, 0, 0].to(self._parameter.device)
        return self._angles[placement.positions.t()][:, :, None, :]
