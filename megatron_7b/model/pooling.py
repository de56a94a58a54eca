"""One vector for each text, from the hidden states of its tokens."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

from megatron_7b.config.finetune_config import PoolingMode


@dataclass(frozen=True)
class Pooling:
    """How texts become vectors.

    Attributes:
        mode: Mean of the tokens of a text, its first or its last one.
        parts: Where each text begins and ends among the tokens of a microbatch.
    """

    mode: PoolingMode
    parts: Sequence[tuple[int, int]]


def pooled_states(hidden: Tensor, pooling: Pooling, *, sequence_parallel: bool, group: dist.ProcessGroup) -> Tensor:
    """Return a vector for each text, FP32 [texts, h], the same on every tensor rank.

    Args:
        hidden: [t, 1, h], or [t/tp, 1, h] with sequence parallelism.
        pooling: Which tokens are of which text.
        sequence_parallel: Whether the tokens are divided among the tensor ranks.
        group: The tensor-parallel group.

    Collective: the group, with sequence parallelism.
    """
    if sequence_parallel:
        hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False, group=group)
    states = hidden.flatten(0, 1).float()
    match pooling.mode:
        case "mean":
            vectors = [states[begin:end].mean(dim=0) for begin, end in pooling.parts]
        case "cls":
            vectors = [states[begin] for begin, _ in pooling.parts]
        case "last":
            vectors = [states[end - 1] for _, end in pooling.parts]
    return torch.stack(vectors) if vectors else states[:0]
