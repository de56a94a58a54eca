"""Low-rank updates beside linear layers, at tensor and sequence parallelism."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple, Self

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor
from torch.nn import Module, Parameter, functional

from megatron_7b.adapter.adapted_linear import AdaptedLinear, Addition, Place, adapted_layers, dropped, local_parameter
from megatron_7b.adapter.low_rank.rows import MAGNITUDE, VALUES, low_rank_rows, scale_of
from megatron_7b.adapter.targets import Projection, projections
from megatron_7b.config.adapters import AdapterConfig
from megatron_7b.config.schema import ModelConfig
from megatron_7b.model.kinds.chunk import ModelChunk
from megatron_7b.model.parameters import ParameterTable


class Factors(Module):
    """The parameters of the update of one projection: this rank's part of each.

    Attributes:
        lora_A: [r, in], or [r, in/tp] where the weight is sharded along its inputs.
        lora_B: [out/tp, r], or [out, r] there.
        lora_magnitude_vector: Norms of the rows of the updated weight, as B; DoRA only.
        lora_E: What lies between A and B as a diagonal matrix, [r, 1]; AdaLoRA only.
    """

    lora_A: Parameter  # noqa: N815 - PEFT's name, which is that of the tensor in files
    lora_B: Parameter  # noqa: N815

    def __init__(self, projection: Projection, adapter: AdapterConfig, place: Place) -> None:
        super().__init__()
        for row in low_rank_rows(projection, adapter):
            self.register_parameter(row.name.rpartition(".")[2], local_parameter(row, place))

    def forward(self) -> None:
        """Compute nothing: a call is where hooks wait for updated parameters (`parallel.overlap_param_gather`)."""


class _Matrices(NamedTuple):
    """What is applied to the inputs and outputs of a layer."""

    down: Tensor
    """[n r, in]."""
    up: Tensor
    """[out/tp, n r]."""
    ratios: Tensor | None
    """What outputs are multiplied by, [out/tp]; DoRA only."""


class LowRankUpdate(Addition):
    """Adds s B A x for the projections that one linear layer computes; with magnitudes, rescales each output too.

    All A are applied in one matrix product, which narrows x to r values per projection; only these are communicated
    between tensor ranks. All B are one matrix with blocks, so that the sum is made while the last product is computed.

    Args:
        slots: All projections of the layer, in the order of its rows.
        chosen: Those that are updated.
        adapter: The section of the configuration.
        place: Where the layer is.
    """

    def __init__(
        self, slots: Sequence[Projection], chosen: Sequence[Projection], adapter: AdapterConfig, place: Place
    ) -> None:
        super().__init__()
        self.slots = list(slots)
        self.scale = scale_of(adapter)
        self.dropout = adapter.dropout
        self.place = place
        self.has_magnitudes = adapter.method == "dora"
        self.has_values = adapter.method == "adalora"
        self._kept: _Matrices | None = None
        self._names = [one.name if one in chosen else None for one in slots]
        for projection in chosen:
            self.add_module(projection.name, Factors(projection, adapter, place))

    @property
    def factors(self) -> list[Factors | None]:
        """The parameters by slot; None for a projection that is left as it is."""
        return [None if name is None else self.get_submodule(name) for name in self._names]  # type: ignore[misc]

    def forward(
        self, linear: AdaptedLinear, x: Tensor, output: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Return the outputs of the updated layer, [s, b, out/tp]; the arguments are those of `Addition.forward`.

        Collective: the tensor-parallel group.
        """
        a, b, ratios = self._matrices(linear.weight)
        if self.training:
            x = dropped(x, self.dropout, is_shard=self.place.sequence_parallel or not self.place.is_column)
        narrow = self._communicated(functional.linear(x, a))
        within = linear.bias if self.has_magnitudes and bias is None and linear.has_bias else None
        if within is not None:
            output = output - within
        updated = torch.addmm(output.flatten(0, -2), narrow.flatten(0, -2), b.t(), alpha=self.scale).view_as(output)
        if ratios is not None:
            updated = updated * ratios.to(updated.dtype)
        return updated if within is None else updated + within, bias

    def _matrices(self, weight: Tensor) -> "_Matrices":
        """Return what the parameters come to; where nothing is trained, they are put together once."""
        if self._kept is not None:
            return self._kept
        for factors in filter(None, self.factors):
            factors()
        a, b = self.joined_down(), self.joined_up()
        found = _Matrices(a, b, self._ratios(self.row_norms(weight, a, b)) if self.has_magnitudes else None)
        if not self.training and not torch.is_grad_enabled():
            self._kept = found
        return found

    def train(self, mode: bool = True) -> Self:
        """Set the mode, and forget what was put together: parameters change while training."""
        self._kept = None
        return super().train(mode)

    def joined_down(self) -> Tensor:
        """Return all A, one below the other: [n r, in]."""
        return torch.cat([one.lora_A for one in self.factors if one is not None])

    def joined_values(self) -> Tensor:
        """Return AdaLoRA's diagonals, one after the other: [n r]."""
        return torch.cat([one.get_parameter(VALUES) for one in self.factors if one is not None]).flatten()

    def joined_up(self) -> Tensor:
        """Return the matrix that takes the narrow values of all projections to the layer's outputs: [out/tp, n r]."""
        chosen = [one for one in self.factors if one is not None]
        if len(self.slots) == 1:
            return chosen[0].lora_B
        rank, place = chosen[0].lora_B.shape[1], itertools.count()
        blocks = []
        for factors, (groups, rows) in zip(self.factors, self._local_rows(), strict=True):
            if factors is None:
                blocks.append(self._like_parameters((groups, rows, rank * len(chosen)), 0.0))
            else:
                before = next(place)
                padding = (rank * before, rank * (len(chosen) - before - 1))
                blocks.append(functional.pad(factors.lora_B.view(groups, rows, rank), padding))
        return torch.cat(blocks, dim=1).flatten(0, 1)

    @torch.no_grad()
    def row_norms(self, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """Return the norms of the rows of W + s B A in FP32, [out/tp]; the sum itself is never made.

        Collective: the tensor-parallel group, where the weight is sharded along its inputs.
        """
        crossed = (b.float() * (weight @ a.t()).float()).sum(1)
        own = ((b.float() @ (a.float() @ a.float().t())) * b.float()).sum(1)
        squares: Tensor = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32).square()
        squares += 2 * self.scale * crossed + self.scale**2 * own
        if not self.place.is_column and self.place.tp_size > 1:
            dist.all_reduce(squares, group=self.place.group)
        return squares.clamp_min_(0.0).sqrt_()

    @torch.no_grad()
    def merged_with(self, weight: Tensor) -> Tensor:
        """Return the weight with the update in it, computed in FP64, on a single tensor rank: [out, in]."""
        assert self.place.tp_size == 1
        down = self.joined_down().double()
        if self.has_values:
            down *= self.joined_values().double().unsqueeze(1)
        merged = weight.double() + self.scale * (self.joined_up().double() @ down)
        if self.has_magnitudes:
            merged *= self._ratios(merged.norm(dim=1)).unsqueeze(1)
        return merged.float()

    @torch.no_grad()
    def take_norms(self, weight: Tensor) -> None:
        """Set the magnitudes to the norms that the rows have, so that nothing is rescaled. Collective: as there."""
        if not self.has_magnitudes:
            return
        norms = self.row_norms(weight, self.joined_down(), self.joined_up())
        for factors, part in zip(self.factors, self._by_slot(norms), strict=True):
            if factors is not None:
                factors.get_parameter(MAGNITUDE).copy_(part.flatten())

    def _ratios(self, norms: Tensor) -> Tensor:
        """Return magnitude / norm by output, [out/tp]; 1 for what is left as it is."""
        ratios = [
            torch.ones_like(part) if factors is None else factors.get_parameter(MAGNITUDE).view_as(part) / part
            for factors, part in zip(self.factors, self._by_slot(norms), strict=True)
        ]
        return torch.cat(ratios, dim=1).flatten()

    def _communicated(self, narrow: Tensor) -> Tensor:
        """Return the n r values of A x that B needs: of the whole sequence if B is sharded; summed if A is.

        AdaLoRA's diagonal is applied where every rank has the whole gradient of its part of the sequence.
        """
        if self.has_values and self.place.is_column:
            narrow = narrow * self.joined_values()
        group = self.place.group
        if self.place.is_column:
            gather, copy = gather_from_sequence_parallel_region, copy_to_tensor_model_parallel_region
            communicated = gather(narrow, group=group) if self.place.sequence_parallel else copy(narrow, group=group)
        else:
            scatter, reduce = reduce_scatter_to_sequence_parallel_region, reduce_from_tensor_model_parallel_region
            communicated = scatter(narrow, group=group) if self.place.sequence_parallel else reduce(narrow, group=group)
        values: Tensor = communicated
        return values * self.joined_values() if self.has_values and not self.place.is_column else values

    def _local_rows(self) -> list[tuple[int, int]]:
        """Return for every slot the number of groups on this rank, and its rows in each."""
        shards = self.place.tp_size if self.place.is_column else 1
        found = []
        for slot in self.slots:
            groups = max(1, slot.num_groups // shards)
            found.append((groups, slot.num_rows // shards // groups))
        return found

    def _by_slot(self, values: Tensor) -> Sequence[Tensor]:
        """Return what belongs to each slot of a value per output, [groups, rows in a group] each."""
        (groups, _), *_ = local_rows = self._local_rows()
        return torch.split(values.view(groups, -1), [rows for _, rows in local_rows], dim=1)

    def _like_parameters(self, shape: tuple[int, ...], value: float) -> Tensor:
        some = next(self.parameters())
        return torch.full(shape, value, dtype=some.dtype, device=some.device)


def attach_updates(
    chunk: ModelChunk, base: ParameterTable, chosen: Sequence[Projection], model: ModelConfig, adapter: AdapterConfig
) -> None:
    """Put an update beside every linear layer of a chunk that has projections to be updated. Collective: none."""
    for core_name, linear in adapted_layers(chunk):
        weight = base.by_core_name(core_name)
        of_layer = [one for one in chosen if one.weight.name == weight.name]
        if of_layer:
            place = Place.of(chunk, is_column=weight.tp_dim == 0)
            linear.adapter = LowRankUpdate(projections(weight, model), of_layer, adapter, place)


def take_norms(chunk: ModelChunk) -> None:
    """Set all magnitudes of a chunk to the norms of the rows of its weights. Collective: the tensor-parallel group."""
    for _, linear in adapted_layers(chunk):
        if isinstance(linear.adapter, LowRankUpdate):
            linear.adapter.take_norms(linear.weight)
