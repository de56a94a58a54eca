"""Adam whose moments lie in host memory: they visit the device for each update, a slice at a time.

The update itself is torch's, on the device, so it gives the numbers that it gives without; what it costs is the way of
the moments there and back, once a step. megatron-core's `HybridDeviceOptimizer` updates on the host instead, and keeps
its state where checkpoints do not look for it.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.adamw import adamw

from megatron_7b.optim.held import take_parameters, without_parameters

SLICE = 1 << 24
"""Elements on their way at a time: 64 MiB of each moment, long enough that copies run at full speed."""


@dataclass(frozen=True)
class _Slice:
    """Some elements of a parameter, and what belongs to them."""

    parameter: Tensor
    gradient: Tensor
    moments: tuple[Tensor, Tensor]
    step: Tensor
    group: dict[str, Any]


class HostAdam(torch.optim.Adam):
    """AdamW, or Adam with the weight decay in the gradient, over the parameter groups of megatron-core's optimizer.

    Args:
        groups: With their parameters, FP32 on one device.
        decoupled: AdamW.
    """

    def __init__(self, groups: Sequence[dict[str, Any]], *, decoupled: bool) -> None:
        super().__init__(without_parameters(groups), decoupled_weight_decay=decoupled)
        take_parameters(self, groups)
        self._update: Callable[..., None] = adamw if decoupled else adam
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for parameter in parameters:
            on_gpu = parameter.is_cuda
            moments = (torch.zeros(parameter.shape, dtype=torch.float32, pin_memory=on_gpu) for _ in range(2))
            first, second = moments
            step = torch.zeros((), dtype=torch.float32, device=parameter.device)
            self.state[parameter] = {"step": step, "exp_avg": first, "exp_avg_sq": second}
        self._lanes = [_Lane(parameters[0].device) for _ in range(2)] if parameters else []

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update all parameters that have gradients; the moments are in host memory again when this returns."""
        assert closure is None
        for number, one in enumerate(self._slices()):
            lane = self._lanes[number % len(self._lanes)]
            with lane.visit(one.moments) as (first, second):
                self._update(
                    [one.parameter], [one.gradient], [first], [second], [], [one.step.clone()],
                    fused=True, amsgrad=False, maximize=False, lr=one.group["lr"], eps=one.group["eps"],
                    beta1=one.group["betas"][0], beta2=one.group["betas"][1],
                    weight_decay=one.group["weight_decay"],
                )  # fmt: skip
        for lane in self._lanes:
            lane.wait()

    def _slices(self) -> Iterator[_Slice]:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                flat = [x.view(-1).split(SLICE) for x in (parameter, state["exp_avg"], state["exp_avg_sq"])]
                gradients = parameter.grad.reshape(-1).split(SLICE)
                for values, first, second, gradient in zip(*flat, gradients, strict=True):
                    yield _Slice(values, gradient, (first, second), state["step"], group)
                state["step"] += 1


class _Lane:
    """Room on the device for the moments of a slice; with two of them, one fills while the other is used.

    Args:
        device: Where the parameters are. On a CPU there is nothing to wait for.
    """

    def __init__(self, device: torch.device) -> None:
        self._room = [torch.empty(0, device=device) for _ in range(2)]
        self._streams: Any = None
        if device.type == "cuda":
            self._streams = torch.cuda.Stream(device), torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    @contextlib.contextmanager
    def visit(self, moments: tuple[Tensor, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Bring moments to the device for the duration of a with block, and take them back."""
        count = moments[0].numel()
        if self._room[0].numel() < count:
            self.wait()
            self._room = [room.new_empty(count) for room in self._room]
        first, second = (room[:count] for room in self._room)
        if self._streams is None:
            first.copy_(moments[0])
            second.copy_(moments[1])
            yield first, second
            moments[0].copy_(first)
            moments[1].copy_(second)
            return
        there, back = self._streams
        there.wait_stream(back)  # what was here before has left
        with torch.cuda.stream(there):
            first.copy_(moments[0], non_blocking=True)
            second.copy_(moments[1], non_blocking=True)
        torch.cuda.current_stream().wait_stream(there)
        yield first, second
        back.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(back):
            moments[0].copy_(first, non_blocking=True)
            moments[1].copy_(second, non_blocking=True)

    def wait(self) -> None:
        """Return once everything is back in host memory."""
        if self._streams is not None:
            for stream in self._streams:
                stream.synchronize()
