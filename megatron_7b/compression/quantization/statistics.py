"""The inputs of a layer's matrices on text: the sum of x x', once for matrices that share their input."""

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn


class InputStatistics:
    """Sums over the inputs of matrices.

    Args:
        linears: The matrices, by name.

    Attributes:
        num_tokens: How many inputs were seen.
    """

    def __init__(self, linears: Mapping[str, nn.Linear]) -> None:
        self._linears = linears
        self._sums: dict[str, Tensor] = {}
        self._leaders: dict[str, str] = {}
        self._latest: tuple[str, Tensor] | None = None
        self.num_tokens = 0

    def hessian(self, name: str) -> Tensor:
        """Return the sum of x x' over the inputs of a matrix, FP32, [in, in]."""
        return self._sums[self._leaders[name]]

    def sharing_input(self) -> list[list[str]]:
        """Return the names of the matrices, those with the same input together."""
        groups: dict[str, list[str]] = {}
        for name, leader in self._leaders.items():
            groups.setdefault(leader, []).append(name)
        return list(groups.values())

    @contextlib.contextmanager
    def gathering(self) -> Iterator[None]:
        """Count what passes through the matrices in, for the duration of a with block."""
        hooks = [
            linear.register_forward_pre_hook(lambda _module, inputs, name=name: self._add(name, inputs[0]))
            for name, linear in self._linears.items()
        ]
        try:
            yield
        finally:
            self._latest = None
            for hook in hooks:
                hook.remove()

    def _add(self, name: str, inputs: Tensor) -> None:
        if self._latest is not None and self._latest[1] is inputs:
            self._leaders[name] = self._latest[0]
            return
        self._latest = (name, inputs)
        self._leaders[name] = name
        flat = inputs.reshape(-1, inputs.shape[-1]).float()
        if not self._sums or name == next(iter(self._sums)):
            self.num_tokens += len(flat)
        if name not in self._sums:
            self._sums[name] = torch.zeros(flat.shape[1], flat.shape[1], device=flat.device)
        self._sums[name].addmm_(flat.T, flat)


def output_error(weight: Tensor, rounded: Tensor, hessian: Tensor) -> float:
    """Return how much a matrix's output changes on text, as a share of its size: the root of both sums of squares.

    Args:
        weight: As it was, FP32, [out, in].
        rounded: As it is now.
        hessian: Of its inputs, [in, in].
    """
    change = rounded - weight
    lost = float((change @ hessian).mul_(change).sum(dtype=torch.float64))
    size = float((weight @ hessian).mul_(weight).sum(dtype=torch.float64))
    return (max(lost, 0.0) / size) ** 0.5 if size > 0 else 0.0


def weight_error(weight: Tensor, rounded: Tensor) -> float:
    """Return how much a matrix changes, as a share of its size."""
    size = float(weight.double().norm())
    return float((rounded.double() - weight.double()).norm()) / size if size > 0 else 0.0
