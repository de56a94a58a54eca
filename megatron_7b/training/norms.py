"""Norms of gradients and parameters by group, such as all of attention: the same at every layout.

Every rank adds up the squares of what it alone holds, or what it is the first to hold, and one exchange adds the ranks.
Nothing is gathered: of what the distributed optimizer divides, each rank takes its share.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_7b.model.builder import described_parameters
from megatron_7b.model.kinds import parameter_table
from megatron_7b.model.parameters import TRAINING_ONLY, Parameter
from megatron_7b.optim.held import held_parameters
from megatron_7b.parallel.groups import data_parallel_group, expert_replicas_group
from megatron_7b.runtime.long_sums import sum_of_squares
from megatron_7b.training.learner import Learner

type NormsBy = Literal["none", "groups", "layers"]

_GROUPS = (
    ("projections", rf"^{re.escape(TRAINING_ONLY)}"),
    ("norms", r"norm"),
    ("attention", r"attention\.|relative_pos_emb"),
    ("mlp", r"\.mlp\."),
    ("embedding", r"^embedding\."),
)
"""Groups by what is in the name of a parameter; the first that fits decides, and what fits none is the head."""


def group_of(name: str, *, by_layer: bool) -> str:
    """Return the group that a parameter is of: `attention`, or `decoder_3_attention`."""
    group = next((group for group, pattern in _GROUPS if re.search(pattern, name)), "head")
    layer = re.match(r"(\w+)\.layers\.(\d+)\.", name) if by_layer else None
    return group if layer is None else f"{layer[1]}_{layer[2]}_{group}"


@dataclasses.dataclass(frozen=True)
class Norms:
    """L2 norms by group.

    Attributes:
        gradients: Of the step, before clipping.
        parameters: Of what the optimizer updates, before the update.
    """

    gradients: Mapping[str, float]
    parameters: Mapping[str, float]

    @property
    def values(self) -> dict[str, float]:
        """Every norm by name, for metrics.jsonl and services that plot curves."""
        of_gradients = {f"grad_norm_{group}": norm for group, norm in self.gradients.items()}
        return {**of_gradients, **{f"parameter_norm_{group}": norm for group, norm in self.parameters.items()}}


@torch.no_grad()
def measure_norms(learner: Learner, *, by_layer: bool) -> Norms:
    """Return the norms of what is trained; call it when the gradients of a step are complete, and before its update.

    Args:
        learner: A model and its optimizer.
        by_layer: Divide groups by layer.

    Collective: all ranks; one sum of two FP64 numbers per group.
    """
    groups = list(dict.fromkeys(group_of(name, by_layer=by_layer) for name in _trained_names(learner)))
    squares = torch.zeros(2, len(groups), dtype=torch.float64, device=learner.device)
    for row, gradient, values in _own_parts(learner):
        column = groups.index(group_of(row.name, by_layer=by_layer))
        squares[0, column] += sum_of_squares(gradient)
        squares[1, column] += sum_of_squares(values)
    dist.all_reduce(squares)
    of_gradients, of_parameters = squares.sqrt().tolist()
    return Norms(dict(zip(groups, of_gradients, strict=True)), dict(zip(groups, of_parameters, strict=True)))


def _trained_names(learner: Learner) -> Iterator[str]:
    """Yield the names of the whole model's parameters that are trained, in an order that is the same on all ranks."""
    adapter, table = (
        learner.on_ranks.adapter,
        parameter_table(learner.config.model, learner.config.model.vocab_size or 1),
    )
    if adapter is None:
        yield from table
        return
    trained = adapter.trained_names(table)
    yield from (name for name in adapter.extended(table) if name in trained)


def _own_parts(learner: Learner) -> Iterator[tuple[Parameter, Tensor, Tensor]]:
    """Yield the flat gradients and values that count on this rank, so that each element counts on exactly one."""
    rows = {parameter: row for chunk in learner.model for row, parameter in described_parameters(chunk.module)}
    for part in learner.optimizer.parts:
        for held in held_parameters(part):
            row = rows[held.parameter]
            if not held.is_share and not _is_first_replica(row):
                continue
            if (row.tp_dim is None and learner.layout.tp_rank > 0) or getattr(held.parameter, "shared", False):
                continue  # another tensor rank has it too, or an earlier stage
            end = min(held.start + held.main.numel(), _num_elements(row, held.parameter, learner))
            length = max(0, end - held.start)
            gradient: Tensor = held.parameter.main_grad  # type: ignore[attr-defined]
            yield row, gradient.view(-1)[held.start : held.start + length], held.main.view(-1)[:length]


def _is_first_replica(row: Parameter) -> bool:
    group = expert_replicas_group() if row.expert is not None else data_parallel_group()
    return dist.get_rank(group) == 0


def _num_elements(row: Parameter, parameter: Tensor, learner: Learner) -> int:
    """Return how many elements of this rank's shard there are without the rows that only pad a vocabulary."""
    vocabulary = learner.config.model.vocab_size
    if not row.is_padded or vocabulary is None:
        return parameter.numel()
    num_rows = parameter.shape[0]
    first = learner.layout.tp_rank * num_rows if row.tp_dim == 0 else 0
    return min(max(0, vocabulary - first), num_rows) * math.prod(parameter.shape[1:])
