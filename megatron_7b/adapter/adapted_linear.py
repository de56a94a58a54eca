"""Linear layers with a place for what an adapter adds to their outputs."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import get_cuda_rng_tracker, set_tensor_model_parallel_attributes
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor
from torch.nn import Parameter, functional

from megatron_7b.model import parameters
from megatron_7b.model.kernels import Kernels
from megatron_7b.model.kinds.chunk import ModelChunk

_PLACE = "adapter."


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where the linear layer is that something is added to.

    Attributes:
        is_column: Its weight is sharded along its outputs; otherwise along its inputs.
        sequence_parallel: Inputs of the former and outputs of the latter are shards of the sequence.
        group: Tensor-parallel ranks.
        dtype: Of the working parameters.
    """

    is_column: bool
    sequence_parallel: bool
    group: dist.ProcessGroup
    dtype: torch.dtype

    @classmethod
    def of(cls, chunk: ModelChunk, *, is_column: bool) -> "Place":
        """Return the place of a layer of a chunk."""
        group: dist.ProcessGroup = chunk.pg_collection.tp
        return cls(
            is_column=is_column,
            sequence_parallel=chunk.config.sequence_parallel and group.size() > 1,
            group=group,
            dtype=chunk.config.params_dtype,
        )

    @property
    def tp_size(self) -> int:
        """Tensor-parallel ranks."""
        return self.group.size()


def dropped(x: Tensor, share: float, *, is_shard: bool) -> Tensor:
    """Return what is left of a tensor without a random share of it, larger by as much.

    Args:
        x: It.
        share: In [0, 1).
        is_shard: Tensor ranks hold different parts; otherwise all hold the same, and leave out the same.
    """
    if share == 0.0:
        return x
    if not is_shard:
        return functional.dropout(x, share)
    with get_cuda_rng_tracker().fork():
        return functional.dropout(x, share)


def local_parameter(row: parameters.Parameter, place: Place) -> Parameter:
    """Return a rank's part of a parameter, with the attributes that megatron-core's optimizers go by; undefined."""
    shape = [size // place.tp_size if dim == row.tp_dim else size for dim, size in enumerate(row.shape)]
    parameter: Any = Parameter(torch.empty(shape, dtype=place.dtype))
    if row.tp_dim is not None:
        set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=row.tp_dim, stride=1)
    elif place.sequence_parallel:
        parameter.sequence_parallel = True  # every rank has the gradient of its own part of the sequence
    made: Parameter = parameter
    return made


class Addition(torch.nn.Module):
    """What is added to the outputs of one linear layer; subclasses have the parameters."""

    def forward(
        self, linear: "AdaptedLinear", x: Tensor, output: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Return what takes the place of the outputs and of the bias that is still to be added to them.

        Args:
            linear: The layer.
            x: Its inputs, [s, b, in], [s, b, in/tp] or [s/tp, b, in].
            output: Its outputs.
            bias: Its bias, if that is not in the outputs.
        """
        raise NotImplementedError


class AdaptedLinear(torch.nn.Module):
    """Mixed into a linear layer of either implementation: `adapter` changes its outputs, if there is one."""

    adapter: Addition | None
    weight: Parameter
    bias: Parameter | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.adapter = None

    @property
    def has_bias(self) -> bool:
        """Whether there is a bias: Transformer Engine's layers have an empty one otherwise."""
        return self.bias is not None and self.bias.numel() > 0

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Return what megatron-core's layer does, as the adapter changes it."""
        output, bias = super().forward(x, *args, **kwargs)
        return (output, bias) if self.adapter is None else self.adapter(self, x, output, bias)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> dict[str, Any]:
        """Describe the parameters to megatron-core's checkpoints, those of the adapter as they are sharded."""
        state: dict[str, Any] = super().sharded_state_dict(prefix, sharded_offsets, metadata)  # type: ignore[misc]
        if self.adapter is None:
            return state
        place = f"{prefix}{_PLACE}"
        added = self.adapter.state_dict(prefix="", keep_vars=True)
        sharded = {name: value for name, value in added.items() if getattr(value, "tensor_model_parallel", False)}
        axes = {name: value.partition_dim for name, value in sharded.items()}
        own = {name: value for name, value in state.items() if not name.startswith(place)}
        return {**own, **make_sharded_tensors_for_checkpoint(added, place, axes, sharded_offsets)}


def adapted(base: Kernels) -> Kernels:
    """Return kernels whose linear layers have a place for an adapter.

    An adapter reads what the linear layer reads. Transformer Engine's fused layer normalizes within, so that it would
    read something else: norm and linear layer are separate there, which computes the same.
    """
    if base.norm_before_linear is IdentityOp:
        base = replace(base, norm_before_linear=base.norm, norm_linear=base.column_linear)
    return replace(
        base,
        norm_linear=_with_place(base.norm_linear),
        column_linear=_with_place(base.column_linear),
        row_linear=_with_place(base.row_linear),
    )


def _with_place(linear: type) -> type:
    return type(f"Adapted{linear.__name__}", (AdaptedLinear, linear), {})


def adapted_layers(chunk: ModelChunk) -> Iterator[tuple[str, AdaptedLinear]]:
    """Yield the linear layers of a chunk, each under megatron-core's name of its weight in the whole model."""
    modules = {id(module.weight): module for module in chunk.modules() if isinstance(module, AdaptedLinear)}
    for name, parameter in list(chunk.named_core_parameters()):
        if id(parameter) in modules:
            yield name, modules[id(parameter)]
