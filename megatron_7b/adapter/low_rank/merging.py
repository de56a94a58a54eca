"""Low-rank updates merged into the weights of a built model."""

import torch

from megatron_7b.adapter.adapted_linear import adapted_layers
from megatron_7b.adapter.low_rank.layers import LowRankUpdate
from megatron_7b.model.kinds.chunk import ModelChunk


@torch.no_grad()
def merge_updates(chunk: ModelChunk) -> None:
    """Put all updates of a chunk into its weights, computed in FP64, and remove them. Collective: as `row_norms`."""
    for _, linear in adapted_layers(chunk):
        update = linear.adapter
        if isinstance(update, LowRankUpdate):
            linear.weight.copy_(update.merged_with(linear.weight))
            linear.adapter = None
