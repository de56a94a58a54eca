"""AdaLoRA between gradients and updates: factors are kept orthogonal, and the least important ranks are switched off.

The importance of a parameter's elements (how much they matter to the loss, smoothed, times how much that varies) is
state of the optimizer, so that checkpoints hold it and every layout can resume it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.optimizer import MegatronOptimizer
from torch import Tensor
from torch.nn import Parameter

from megatron_7b.adapter.adalora import RankBudget
from megatron_7b.config.schema import RunConfig
from megatron_7b.model.builder import described_parameters
from megatron_7b.model.parameters import Parameter as Row
from megatron_7b.optim.held import Held, held_parameters
from megatron_7b.parallel.groups import data_parallel_group, process_groups

DOWN, UP, VALUES = "lora_A", "lora_B", "lora_E"
SENSITIVITY, UNCERTAINTY, KEPT = "sensitivity", "uncertainty", "kept"


@dataclass(frozen=True)
class _Factor:
    """A factor of an update, or its singular values, as far as this rank has it.

    Attributes:
        row: The whole.
        update: Number of the update in the whole model.
        parameter: This rank's part.
        held: What the optimizer updates of it; None if other ranks do.
        state: The optimizer's, of that.
    """

    row: Row
    update: int
    parameter: Parameter
    held: Held | None
    state: dict[str, Tensor]

    @property
    def kind(self) -> str:
        return self.row.name.rpartition(".")[2]

    @property
    def is_sharded(self) -> bool:
        return self.row.tp_dim is not None


class RankAllocator:
    """Does what AdaLoRA adds to the steps of an optimizer.

    Args:
        parts: megatron-core's optimizers, whose state is there.
        chunks: Their model chunks.
        config: The run.
    """

    def __init__(
        self, parts: Sequence[MegatronOptimizer], chunks: Sequence[DistributedDataParallel], config: RunConfig
    ) -> None:
        self._adapter = config.adapter
        table = chunks[0].module.table
        updates = [name.rpartition(".")[0] for name in table if name.endswith(f".{VALUES}")]
        self._numbers = {name: number for number, name in enumerate(updates)}
        self._budget = RankBudget(
            adapter=config.adapter, num_updates=len(updates), total_steps=config.training.train_steps
        )
        self._factors = list(self._find_factors(parts, chunks))
        self._kept: Tensor | None = None
        for factor in self._factors:
            if factor.held is not None:
                names = (SENSITIVITY, UNCERTAINTY)
                factor.state.update({name: torch.zeros_like(factor.held.main) for name in names})
                if factor.kind == VALUES:
                    factor.state[KEPT] = torch.ones_like(factor.held.main)

    def _find_factors(
        self, parts: Sequence[MegatronOptimizer], chunks: Sequence[DistributedDataParallel]
    ) -> Iterator[_Factor]:
        found: dict[Parameter, tuple[Held, dict[str, Tensor]]] = {}
        for part in parts:
            if part.init_state_fn is not None and part.optimizer is not None and not any(part.optimizer.state.values()):
                part.init_state_fn(part.optimizer, part.config)
            for held in held_parameters(part):
                state: Any = part.optimizer.state[held.main]
                found[held.parameter] = held, state
        for chunk in chunks:
            for row, parameter in described_parameters(chunk.module):
                update, _, kind = row.name.rpartition(".")
                if kind in (DOWN, UP, VALUES):
                    own, state = found.get(parameter, (None, {}))
                    yield _Factor(row, self._numbers[update], parameter, own, state)

    @torch.no_grad()
    def add_gradients(self) -> None:
        """Add the gradient of the distance of all factors from orthogonality to the finished gradients.

        Collective: the tensor-parallel group.
        """
        factors = [factor for factor in self._factors if factor.kind != VALUES]
        if not factors or not self._adapter.orth_reg_weight:
            return
        squares = torch.stack([_square(factor) for factor in factors])
        group = process_groups().tp
        sharded = torch.tensor([factor.is_sharded for factor in factors], device=squares.device)
        if group.size() > 1:
            shares = squares[sharded]
            dist.all_reduce(shares, group=group)
            squares[sharded] = shares
        squares -= torch.eye(squares.shape[-1], dtype=squares.dtype, device=squares.device)
        norms = torch.linalg.matrix_norm(squares).clamp_min(torch.finfo(squares.dtype).tiny)
        weight = self._adapter.orth_reg_weight / (2 * len(self._numbers))
        directions = squares * (2 * weight / norms)[:, None, None]
        for factor, direction in zip(factors, directions, strict=True):
            values = factor.parameter.to(direction.dtype)
            gradient: Any = factor.parameter
            gradient.main_grad += direction @ values if factor.kind == DOWN else values @ direction

    @torch.no_grad()
    def after_update(self, step: int) -> None:
        """Measure importance, and switch off what the budget has no place for.

        Args:
            step: Number of updates that the optimizer has done, this one included.

        Collective: all ranks.
        """
        phase, budget = self._budget.phase(step), self._budget.after(step)
        if phase == "choosing":
            self._measure()
        if budget is not None and (surplus := self._budget.initial - budget) > 0:
            scores = self._scores()
            self._kept = scores > scores.flatten().kthvalue(surplus).values
            self._keep(self._kept)
        if phase == "chosen":
            for factor in self._factors:
                for name in (SENSITIVITY, UNCERTAINTY):
                    if name in factor.state:
                        factor.state[name].zero_()
        if phase == "fixed":
            self._kept = self._stored_choice() if self._kept is None else self._kept
            self._keep(self._kept)

    def _measure(self) -> None:
        beta1, beta2 = self._adapter.beta1, self._adapter.beta2
        for factor in self._factors:
            if factor.held is None:
                continue
            main = factor.held.main
            assert main.grad is not None
            now, mean, deviation = (main * main.grad).abs(), factor.state[SENSITIVITY], factor.state[UNCERTAINTY]
            mean.mul_(beta1).add_(now, alpha=1 - beta1)
            deviation.mul_(beta2).add_((now - mean).abs(), alpha=1 - beta2)

    def _scores(self) -> Tensor:
        """Return the importance of each rank of each update in the whole model, FP64 [updates, r], on all ranks."""
        scores = self._zeros()
        for factor in self._factors:
            if (held := factor.held) is None or not self._counts(factor, held):
                continue
            elements = (factor.state[SENSITIVITY] * factor.state[UNCERTAINTY]).flatten().double()
            of_rank, whole = self._ranks_of(factor, held), factor.row.shape
            if factor.kind != VALUES:
                elements = elements / (whole[1] if factor.kind == DOWN else whole[0])
            scores[factor.update].index_add_(0, of_rank, elements)
        dist.all_reduce(scores)
        return scores

    def _stored_choice(self) -> Tensor:
        """Return which ranks were kept for good, bool [updates, r], from the optimizer's state on all ranks."""
        kept = self._zeros()
        for factor in self._factors:
            if factor.kind == VALUES and (held := factor.held) is not None and self._counts(factor, held):
                kept[factor.update].index_add_(0, self._ranks_of(factor, held), factor.state[KEPT].flatten().double())
        dist.all_reduce(kept)
        return kept > 0

    def _keep(self, kept: Tensor) -> None:
        """Set all other singular values to zero."""
        for factor in self._factors:
            if factor.kind != VALUES:
                continue
            own = kept[factor.update]
            factor.parameter.masked_fill_(~own.view_as(factor.parameter), 0.0)
            if (held := factor.held) is not None:
                chosen = own[self._ranks_of(factor, held)].view_as(held.main)
                held.main.masked_fill_(~chosen, 0.0)
                factor.state[KEPT].copy_(chosen)

    def _ranks_of(self, factor: _Factor, held: Held) -> Tensor:
        """Return which rank of the update each element belongs to that the optimizer has here."""
        places = torch.arange(held.start, held.start + held.main.numel(), device=held.main.device)
        rank = self._adapter.initial_rank
        return places % rank if factor.kind == UP else places // (factor.parameter.numel() // rank)

    @staticmethod
    def _counts(factor: _Factor, held: Held) -> bool:
        """Whether this rank speaks for what it has: of ranks that have the same, one does."""
        return (factor.is_sharded or process_groups().tp.rank() == 0) and (
            held.is_share or data_parallel_group().rank() == 0
        )

    def _zeros(self) -> Tensor:
        size = (len(self._numbers), self._adapter.initial_rank)
        device = torch.device("cuda") if dist.get_backend() == "nccl" else torch.device("cpu")
        return torch.zeros(size, dtype=torch.float64, device=device)


def _square(factor: _Factor) -> Tensor:
    """Return A Aᵀ or Bᵀ B, as far as this rank has it, in FP32 [r, r]."""
    values = factor.parameter.float()
    return values @ values.t() if factor.kind == DOWN else values.t() @ values
