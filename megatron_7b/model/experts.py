"""The experts of a layer that a rank holds, described to checkpoints one by one."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as functional
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import replace_prefix_for_sharding
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group
from torch import Tensor

_ROWS = 64
"""An expert's tokens are filled up to a multiple of this where every number of rows costs memory and time once."""


class Experts(SequentialMLP):
    """megatron-core's experts, each of which is an MLP of linear layers like any other.

    Each has parameters of its own in checkpoints, where megatron-core stacks those of all experts.
    """

    def forward(
        self, permuted_local_hidden_states: Tensor, tokens_per_expert: Tensor, permuted_probs: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Let each expert work on its tokens.

        On a CPU, BF16 products are oneDNN's, which compiles one for every new shape and keeps 1,024 of them. How many
        tokens an expert gets is another number in each microbatch: without rows of zeros that make shapes repeat, a
        run compiles all the time, and grows by as much as 200 MB in its first steps.

        Args:
            permuted_local_hidden_states: [t, h], the tokens of the first expert, then of the second, and so on.
            tokens_per_expert: [experts]
            permuted_probs: What the outputs are weighed by, [t].

        Returns:
            [t, h], and no bias.
        """
        hidden = permuted_local_hidden_states
        if hidden.device.type != "cpu" or hidden.dtype != torch.bfloat16:
            result: tuple[Tensor, Tensor | None] = super().forward(hidden, tokens_per_expert, permuted_probs)
            return result
        counts, outputs = tokens_per_expert.tolist(), []
        of_experts = zip(
            self.local_experts, torch.split(hidden, counts), torch.split(permuted_probs, counts), strict=True
        )
        for expert, tokens, probs in of_experts:
            added = -len(tokens) % _ROWS
            output, _ = expert(functional.pad(tokens, (0, 0, 0, added)), functional.pad(probs, (0, added)))
            outputs.append(output[: len(tokens)])
        return torch.cat(outputs), None

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Describe the parameters under the numbers of their experts in the whole layer."""
        described = ensure_metadata_has_dp_cp_group(metadata)
        first = self.ep_group.rank() * self.num_local_experts
        state: dict[str, Any] = {}
        for local, expert in enumerate(self.local_experts):
            own = f"{prefix}local_experts.{local}."
            of_expert = expert.sharded_state_dict(own, sharded_offsets, described)
            replace_prefix_for_sharding(of_expert, own, f"{prefix}local_experts.{first + local}.")
            state |= {name: self._with_own_replicas(entry) for name, entry in of_expert.items()}
        return state

    def _with_own_replicas(self, entry: Any) -> Any:
        """Tell the replicas of an expert apart by their rank among those that hold it."""
        if not isinstance(entry, ShardedTensor | ShardedTensorFactory):
            return entry
        *copies, _ = entry.replica_id
        return replace(entry, replica_id=(*copies, self.dp_group.rank()))
