"""An adapter from outside the package: a narrow detour beside the linear layers that write into the residual stream."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region, set_tensor_model_parallel_attributes
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor
from torch.nn import functional

from megatron_7b.model.adapter import Adapter
from megatron_7b.model.kernels import Kernels
from megatron_7b.model.parameters import Parameter, ParameterTable

RANK = 2


def with_detour(linear: Any) -> type:
    """Return a linear layer sharded along its inputs, plus B (A x), where A is sharded as the weight is."""

    class Lora(linear):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            size, width = self.weight.shape  # [h, f/tp]
            self.lora_a = torch.nn.Parameter(torch.empty(RANK, width, dtype=self.weight.dtype))
            self.lora_b = torch.nn.Parameter(torch.empty(size, RANK, dtype=self.weight.dtype))
            set_tensor_model_parallel_attributes(self.lora_a, is_parallel=True, dim=1, stride=1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
            output, bias = super().forward(x)
            narrow = reduce_from_tensor_model_parallel_region(functional.linear(x, self.lora_a), group=self.tp_group)
            return output + functional.linear(narrow, self.lora_b), bias

        def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> Any:
            state = self.state_dict(prefix="", keep_vars=True)
            axes = {"weight": 1, "lora_a": 1}
            return make_sharded_tensors_for_checkpoint(state, prefix, axes, sharded_offsets)

    return Lora


def rows(table: ParameterTable) -> Iterator[Parameter]:
    for weight in table.values():
        if weight.name.endswith(("linear_proj.weight", "linear_fc2.weight")):
            size, width = weight.shape
            for part, shape, tp_dim in (("lora_a", (RANK, width), 1), ("lora_b", (size, RANK), None)):
                name, core_name = (f"{one.removesuffix('weight')}{part}" for one in (weight.name, weight.core_name))
                init: Any = "normal" if part == "lora_a" else "zeros"
                yield replace(weight, name=name, core_name=core_name, shape=shape, tp_dim=tp_dim, init=init)


def kernels(base: Kernels) -> Kernels:
    return replace(base, row_linear=with_detour(base.row_linear))


LORA = Adapter(kernels=kernels, rows=rows)
