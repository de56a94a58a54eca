"""The weights of the smaller model, taken one after the other from those of the larger one.

What a dimension of a parameter is follows from the table of parameters, as in `conversion.growing`, whose inverse this
is; names of parameters do not matter.
"""

import re
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from megatron_7b.compression.pruning.plan import PruningPlan
from megatron_7b.compression.pruning.scores import Kept
from megatron_7b.config.schema import ModelConfig
from megatron_7b.conversion.growing.axes import Axis, find_axes
from megatron_7b.model.kinds import parameter_table
from megatron_7b.model.parameters import Parameter

_LAYER = re.compile(r"(?P<stack>.*\blayers)\.(?P<number>\d+)\.")


def prune_weights(
    weights: Mapping[str, Tensor], plan: PruningPlan, kept: Kept, vocab_size: int
) -> Iterator[tuple[str, Tensor]]:
    """Take the weights of the smaller model.

    Args:
        weights: Those of the model by name, possibly lazy; each is read when it is needed.
        plan: Both shapes.
        kept: What is taken.
        vocab_size: True vocabulary size.

    Yields:
        Name and tensor of each parameter, in the order of the forward pass; number formats stay.
    """
    table, axes = parameter_table(plan.source, vocab_size), find_axes(plan.source, vocab_size)
    factors = dict(zip(stream_norms(plan.source), kept.norm_factors.tolist(), strict=True))
    slicer = _Slicer(plan, kept)
    for name in parameter_table(plan.target, vocab_size):
        match = _LAYER.match(name)
        place = int(match["number"]) if match else 0
        origin = f"{match['stack']}.{kept.layers[place]}.{name[match.end() :]}" if match else name
        tensor = weights[origin]
        for dim, axis in enumerate(axes[origin]):
            index = slicer.index(table[origin], axis, dim, place)
            tensor = tensor if index is None else tensor.index_select(dim, index)
        if factors.get(origin, 1.0) != 1.0:
            tensor = (tensor.float() * factors[origin]).to(tensor.dtype)
        yield name, tensor


def stream_norms(model: ModelConfig) -> list[str]:
    """Return the weights of the norms of the residual stream: of every layer two, and the last one."""
    return [name for name, axes in find_axes(model, vocab_size=1).items() if axes == ("scale",)]


class _Slicer:
    """Says which entries of a parameter's dimension are kept."""

    def __init__(self, plan: PruningPlan, kept: Kept) -> None:
        source = plan.source
        self._kept, self._width, self._units = kept, source.head_width, source.ffn_hidden_size
        self._queries = source.num_attention_heads // source.query_groups
        self._channels = torch.from_numpy(kept.channels)

    def index(self, parameter: Parameter, axis: Axis, dim: int, place: int) -> Tensor | None:
        """Return the entries, or None for all of them.

        Args:
            parameter: Row of the larger model's table.
            axis: What the dimension is.
            dim: Its number.
            place: Of the smaller model's layer.
        """
        match axis:
            case "written" | "read" | "scale" | "shift":
                return self._channels
            case "units":
                units = torch.from_numpy(self._kept.units[place])
                is_gated = dim == 0 and parameter.arrangement == "gate_up"
                return torch.cat([units, units + self._units]) if is_gated else units
            case "heads":
                return self._head_rows(parameter if dim == 0 else None, place)
            case "head" | "fixed":
                return None

    def _head_rows(self, parameter: Parameter | None, place: int) -> Tensor:
        """Return rows of a projection to queries, keys and values; without one the channels of query heads."""
        blocks: list[int] = []
        for group, members in self._kept.groups[place]:
            if parameter is not None and parameter.arrangement == "query_key_value":
                first = group * (self._queries + 2)
                blocks += [first + member for member in (*members, self._queries, self._queries + 1)]
            else:
                blocks += [group * self._queries + member for member in members]
        return (torch.tensor(blocks)[:, None] * self._width + torch.arange(self._width)).flatten()
