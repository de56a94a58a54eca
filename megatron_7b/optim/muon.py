"""Muon: the matrices of layers are updated by their orthogonalized momentum, everything else by AdamW.

Source: Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks"; the scale that makes its updates
as large as AdamW's: Liu et al. 2025, "Muon is scalable for LLM training". megatron-core has one as well, which needs a
further package, leaves gate and up rows in one matrix, and by default orthogonalizes each tensor rank's part alone.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_7b.config.optimizer_config import OptimizerConfig
from megatron_7b.config.schema import ModelConfig
from megatron_7b.model.parameters import Parameter
from megatron_7b.optim.held import take_parameters, without_parameters
from megatron_7b.optim.matrices import MatrixExchange

MOMENTUM = "momentum_buffer"
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic polynomial that each Newton-Schulz step applies to the singular values: steepest at zero, so that
small ones rise fast; the values end between 0.7 and 1.2 instead of at 1, which costs nothing."""
_EPSILON = 1e-7


class Muon(torch.optim.Optimizer):
    """Muon for the parameter groups that are marked with `muon`, AdamW for the others.

    Args:
        groups: Parameter groups with `lr` and `weight_decay`.
        names: Of the matrices, by the tensor that holds this rank's part of each; in the groups marked `muon`.
        exchange: Makes whole matrices of these parts.
        model: Shape of the model.
        settings: Momentum, number of steps, scale; AdamW's moments.

    Collective: `step` is one of the exchange's group.
    """

    def __init__(
        self,
        groups: Sequence[dict[str, Any]],
        *,
        names: dict[Tensor, str],
        exchange: MatrixExchange,
        model: ModelConfig,
        settings: OptimizerConfig,
    ) -> None:
        super().__init__(without_parameters(groups), {})
        self._names, self._exchange, self._model, self._settings = names, exchange, model, settings
        self._muon_groups = [group for group in self.param_groups if group.get("muon")]
        others = [group for group in self.param_groups if not group.get("muon")]
        self._adamw = torch.optim.AdamW(
            others or without_parameters([{}]),  # an adapter may consist of matrices alone
            betas=(settings.adam_beta1, settings.adam_beta2),
            eps=settings.adam_eps,
            fused=True,
        )
        self._adamw.state = self.state  # one state for all parameters, as a checkpoint sees it
        take_parameters(self, groups)
        for group in self._muon_groups:
            for tensor in group["params"]:
                self.state[tensor] = {MOMENTUM: torch.zeros_like(tensor)}

    @property
    def adamw(self) -> torch.optim.AdamW:
        """What updates the parameters that are not matrices of layers."""
        return self._adamw

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update all parameters from their gradients. Collective: the exchange's group."""
        assert closure is None
        settings = self._settings
        held, updates = {}, {}
        for group in self._muon_groups:
            for tensor in group["params"]:
                momentum: Tensor = self.state[tensor][MOMENTUM]
                momentum.lerp_(tensor.grad, 1.0 - settings.muon_momentum)
                name = self._names[tensor]
                held[name] = tensor, group
                update = tensor.grad.lerp(momentum, settings.muon_momentum) if settings.muon_nesterov else momentum
                updates[name] = update.flatten()
        for name, update in self._exchange.apply(self._direction, updates):
            tensor, group = held[name]
            tensor.mul_(1.0 - group["lr"] * group["weight_decay"])
            tensor.add_(update.view(tensor.shape), alpha=-group["lr"])
        self._adamw.step()

    def _direction(self, row: Parameter, momentum: Tensor) -> Tensor:
        """Return what a whole parameter moves by, per unit of the learning rate."""
        settings = self._settings
        dtype = torch.bfloat16 if settings.muon_matmul_dtype == "bf16" else torch.float32
        return joined(
            row,
            [
                orthogonalized(matrix.to(dtype), num_steps=settings.muon_num_ns_steps).to(momentum.dtype)
                * (scale(*matrix.shape, mode=settings.muon_scale_mode) * settings.muon_extra_scale_factor)
                for matrix in divided(row, momentum, self._model)
            ],
            self._model,
        )


def orthogonalized(matrix: Tensor, *, num_steps: int) -> Tensor:
    """Return roughly U V^T of a matrix U S V^T.

    Args:
        matrix: [r, c], in the format to compute in.
        num_steps: Newton-Schulz steps.

    Source: Jordan et al. 2024; in BF16 the same operations as those of torch.optim.Muon.
    """
    a, b, c = _COEFFICIENTS
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if is_tall else matrix
    x = x / x.norm().clamp(min=_EPSILON)  # now the largest singular value is at most 1
    for _ in range(num_steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if is_tall else x


def scale(rows: int, columns: int, *, mode: str) -> float:
    """Return the factor of an orthogonalized matrix [rows, columns].

    Source: the names and formulas of megatron-core's `muon_scale_mode`.
    """
    match mode:
        case "spectral":
            return float(max(rows, columns) ** 0.5)
        case "shape_scaling":
            return float(max(1.0, rows / columns) ** 0.5)
        case "unit_rms_norm":
            return float((rows / columns) ** 0.5)
    raise ValueError(f"no scale of Muon is called {mode!r}")


def divided(row: Parameter, whole: Tensor, model: ModelConfig) -> list[Tensor]:
    """Return the matrices that a parameter consists of: query, key and value, gate and up projection, or itself.

    Args:
        row: The parameter.
        whole: Its values, [rows, columns], or others in the same arrangement.
        model: Shape of the model.
    """
    if row.arrangement == "gate_up":
        return list(whole.chunk(2))
    if sizes := _rows_per_group(row, model):
        by_group = whole.view(model.query_groups, -1, whole.shape[1])
        return [part.flatten(0, 1) for part in torch.split(by_group, sizes, dim=1)]
    return [whole]


def joined(row: Parameter, matrices: Sequence[Tensor], model: ModelConfig) -> Tensor:
    """Return a whole parameter of the matrices that it consists of; the inverse of `divided`."""
    if _rows_per_group(row, model):
        by_group = [matrix.view(model.query_groups, -1, matrix.shape[1]) for matrix in matrices]
        return torch.cat(by_group, dim=1).flatten(0, 1)
    return torch.cat(list(matrices))


def _rows_per_group(row: Parameter, model: ModelConfig) -> list[int]:
    """Return the rows of query, key and value heads in each query group, as far as a parameter has them."""
    width = model.head_width
    key_value = [width, width]
    match row.arrangement:
        case "query_key_value":
            return [model.num_attention_heads // model.query_groups * width, *key_value]
        case "key_value":
            return key_value
    return []
