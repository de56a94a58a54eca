"""The head of classic tasks, in the place of a model's output layer: classes of texts or tokens, borders of answers."""

import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor
from torch.nn import functional

from megatron_7b.model.kinds.kind import ChunkPlan


class TaskHead(torch.nn.Linear):
    """A linear layer that every tensor rank of the last stage holds whole, as it works on few tokens.

    Every rank computes the same from the same hidden states, so neither they nor its gradients need a collective.

    Args:
        plan: What the model chunk is built from.
    """

    def __init__(self, plan: ChunkPlan) -> None:
        model, core = plan.config.model, plan.core_config
        has_bias = "task_head.bias" in plan.table
        super().__init__(core.hidden_size, model.num_labels, bias=has_bias, dtype=core.params_dtype)
        self._dropout = model.hidden_dropout

    def forward(self, hidden: Tensor) -> Tensor:
        """Return FP32 [n, labels] for hidden states [n, h]."""
        return super().forward(functional.dropout(hidden, self._dropout, self.training)).float()


def picked_states(
    hidden: Tensor, positions: Tensor, *, sequence_parallel: bool, group: torch.distributed.ProcessGroup
) -> Tensor:
    """Return the hidden states of some tokens, [n, h], the same on every tensor rank.

    Args:
        hidden: [t, 1, h], or [t/tp, 1, h] with sequence parallelism.
        positions: [n], which of the t tokens.
        sequence_parallel: Whether the tokens are divided among the tensor ranks.
        group: The tensor-parallel group.

    Collective: the group, with sequence parallelism.
    """
    if sequence_parallel:
        hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False, group=group)
    return hidden.flatten(0, 1)[positions]
