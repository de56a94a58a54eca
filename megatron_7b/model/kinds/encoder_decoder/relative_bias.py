"""T5's relative position bias: what is added to attention scores for the distance of a key from its query.

One table per stack, [buckets, heads], serves all of its layers; a tensor rank holds the columns of its heads.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor
from torch.nn import functional


class RelativePositionBias(MegatronModule):
    """The bias of one stack.

    Args:
        config: megatron-core's.
        num_buckets: Distances that are told apart.
        max_distance: From here on all distances are alike.
        is_bidirectional: Half of the buckets are for keys after the query; else these all count as distance 0.
        tp_group: Ranks that share the heads.

    Attributes:
        weight: [buckets, n/tp].
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        num_buckets: int,
        max_distance: int,
        is_bidirectional: bool,
        tp_group: torch.distributed.ProcessGroup,
    ) -> None:
        super().__init__(config=config)
        self.max_distance = max_distance
        self.is_bidirectional = is_bidirectional
        self.tp_group = tp_group
        heads = config.num_attention_heads // tp_group.size()
        self.weight = torch.nn.Parameter(torch.empty(num_buckets, heads, dtype=config.params_dtype))
        set_tensor_model_parallel_attributes(self.weight, True, 1, 1)

    def forward(self, num_queries: int, num_keys: int) -> Tensor:
        """Return the bias of queries and keys that both begin at position 0.

        Args:
            num_queries: s.
            num_keys: s_k.

        Returns:
            [1, n/tp, s, s_k].
        """
        distances = torch.arange(1 - num_queries, num_keys, device=self.weight.device)
        # In FP32: the gradient of a distance is a sum over all pairs of positions that are so far apart.
        biases = functional.embedding(self._buckets(distances), self.weight.float())
        # Each query sees a window of the distances, which begins one earlier than that of the query before.
        return biases.t().unfold(1, num_keys, 1).flip(1)[None].to(self.weight.dtype)

    def of_distances(self, distances: Tensor) -> Tensor:
        """Return the biases [..., n/tp] of distances [...], the position of the key less that of the query."""
        return functional.embedding(self._buckets(distances), self.weight)

    def _buckets(self, distances: Tensor) -> Tensor:
        return find_buckets(
            distances, len(self.weight), max_distance=self.max_distance, is_bidirectional=self.is_bidirectional
        )

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[Any, ...] = (),
        metadata: Mapping[str, Any] | None = None,  # noqa: ARG002 - part of megatron-core's interface
    ) -> dict[str, Any]:
        """Describe the table to megatron-core's checkpoints: sharded along its heads."""
        tensors = self.state_dict(prefix="", keep_vars=True)
        state: dict[str, Any] = make_sharded_tensors_for_checkpoint(tensors, prefix, {"weight": 1}, sharded_offsets)
        return state


def find_buckets(distances: Tensor, num_buckets: int, *, max_distance: int, is_bidirectional: bool) -> Tensor:
    """Return the bucket of each distance, the position of the key less that of the query.

    Half of the buckets of a direction are for one distance each, from 0; the others grow in proportion to the distance,
    up to `max_distance`.

    Source: T5's Mesh TensorFlow code. The order of operations in FP32 is that of transformers: it decides about
    distances on the border of two buckets.
    """
    offset = torch.zeros_like(distances)
    if is_bidirectional:
        num_buckets //= 2
        offset = (distances > 0) * num_buckets
        lengths = distances.abs()
    else:
        lengths = (-distances).clamp(min=0)
    num_exact = num_buckets // 2
    growth = torch.log(lengths.float() / num_exact) / math.log(max_distance / num_exact)
    growing = num_exact + (growth * (num_buckets - num_exact)).clamp(min=0).long()
    return offset + torch.where(lengths < num_exact, lengths, growing.clamp(max=num_buckets - 1))


def share_bias(hidden: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Return the hidden states that enter a stack, and the bias as its layers may use it, recomputed ones as well.

    A layer that is recomputed runs a backward pass of its own, in which the graph that the bias comes from must not be
    walked through once per layer. So layers get a leaf, whose gradient adds up over all of them; it enters the graph of
    the bias when the backward pass leaves the stack, through its inputs.

    Args:
        hidden: [s, b, h].
        bias: Of any shape.
    """
    if not (torch.is_grad_enabled() and bias.requires_grad):
        return hidden, bias
    leaf = bias.detach().requires_grad_()
    shared: Tensor = _BiasGradient.apply(hidden, bias, (leaf,))  # no tensor: else the leaf would wait for this gradient
    return shared, leaf


class _BiasGradient(torch.autograd.Function):
    """Identity on the hidden states; its backward pass hands the gradient of the leaf on to what the leaf is of."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, bias: Tensor, leaf: tuple[Tensor]) -> Tensor:  # noqa: ARG004
        (ctx.leaf,) = leaf
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor | None, None]:
        # Autograd adds to leaves first, and all layers of the stack come before its inputs.
        gradient, ctx.leaf.grad = ctx.leaf.grad, None
        return grad_output, gradient, None
