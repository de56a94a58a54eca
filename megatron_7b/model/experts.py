"""The experts of a layer that a rank holds, described to checkpoints one by one."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import replace_prefix_for_sharding
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group


class Experts(SequentialMLP):
    """megatron-core's experts, each of which is an MLP of linear layers like any other.

    Each has parameters of its own in checkpoints, where megatron-core stacks those of all experts.
    """

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
