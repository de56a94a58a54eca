"""What memory is held for, on the rank that holds most of each kind, beside what was predicted."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from megatron_7b.model.core_config import params_dtype
from megatron_7b.model.memory import training_need
from megatron_7b.page_parts import format_size
from megatron_7b.planning import expected_memory
from megatron_7b.runtime.machine.hardware import peak_memory_bytes
from megatron_7b.training.agreement import Ranks
from megatron_7b.training.learner import Learner

_HELD = ("parameters", "gradients", "optimizer")
KINDS = (*_HELD, "teacher", "activations", "reserved", "before")
"""What memory is held for. Activations are all that the steps have had beyond what is held between them, at the peak.
`reserved` is what torch has taken from a GPU; `before` what the process held before its model was built, on a CPU."""


@dataclasses.dataclass(frozen=True)
class MemoryReport:
    """Bytes by kind, each on the rank that holds most of it.

    Attributes:
        kinds: By name, of those that there are.
        predicted: The same as `model.memory` has it; empty after the first report of a start.
    """

    kinds: Mapping[str, int]
    predicted: Mapping[str, int]

    @property
    def values(self) -> dict[str, float]:
        """Every number by name, for metrics.jsonl and services that plot curves."""
        values = {f"{name}_bytes": number for name, number in self.kinds.items()}
        return {**values, **{f"predicted_{name}_bytes": number for name, number in self.predicted.items()}}

    def __str__(self) -> str:
        return ", ".join(self._in_words(name, number) for name, number in self.kinds.items())

    def _in_words(self, name: str, number: int) -> str:
        known = f" (predicted: {_size(self.predicted[name])})" if name in self.predicted else ""
        if name == "before":
            return f"and {_size(number)} before the model was built"
        return f"{name} {_size(number)}{known}"


class MemoryKinds:
    """Measures memory by kind; what is held between steps only once.

    Args:
        learner: A model and its optimizer.
        ranks: All ranks.

    Collective: none.
    """

    def __init__(self, learner: Learner, ranks: Ranks) -> None:
        self._learner, self._ranks = learner, ranks
        self._held: dict[str, int] | None = None

    def report(self) -> MemoryReport:
        """Return what is held; the same on all ranks. The first time after a step, so that optimizers have their state.

        Collective: all ranks.
        """
        is_first = self._held is None
        if self._held is None:
            self._held = held_bytes(self._learner)
        own = {**self._held, "activations": self._activations(self._held), **self._of_device()}
        found = dict(zip(KINDS, self._ranks.maximum(*(own.get(name, 0) for name in KINDS)), strict=True))
        kinds = {name: number for name, number in found.items() if number or name in _HELD}
        if not is_first:
            return MemoryReport(kinds, {})
        predicted = predicted_bytes(self._learner)
        largest = self._ranks.maximum(*predicted.values())
        return MemoryReport(kinds, dict(zip(predicted, largest, strict=True)))

    def _activations(self, held: Mapping[str, int]) -> int:
        peak = peak_memory_bytes(self._learner.on_ranks.device_type)
        return max(0, peak - self._learner.bytes_before - sum(held.values()))

    def _of_device(self) -> dict[str, int]:
        if self._learner.on_ranks.device_type == "cuda":
            return {"reserved": torch.cuda.max_memory_reserved()}
        return {"before": self._learner.bytes_before}


def predicted_bytes(learner: Learner) -> dict[str, int]:
    """Return what arithmetic says that this rank holds; a teacher's part apart, which is not predicted here."""
    config, on_ranks = learner.config, learner.on_ranks
    width = params_dtype(config.precision, on_ranks.device_type).itemsize
    need = training_need(config, on_ranks.layout, bytes_per_parameter=width, adapter=on_ranks.adapter)
    held = {name: int(vars(need)[name]) for name in _HELD}
    if on_ranks.device_type == "cpu":
        held["optimizer"] += need.host_moments
    planned = expected_memory(
        config,
        on_ranks.layout,
        device_type=on_ranks.device_type,
        width=width,
        adapter=on_ranks.adapter,
        predicted_share=learner.objective.predicted_share(config),
    )
    if on_ranks.device_type == "cuda":
        return {**held, "activations": planned.activations + planned.logits}
    # On a CPU: all that the process grows by from here, with what it lacks of the code and the work space of a step.
    first_step = max(0, planned.context + planned.nccl - learner.bytes_before)
    return {**held, "activations": planned.activations + planned.logits + first_step}


def held_bytes(learner: Learner) -> dict[str, int]:
    """Return what this rank holds between steps on its device, each storage counted once, where it is first found."""
    parameters = [one for chunk in learner.model for one in (*chunk.parameters(), *_buffers(chunk))]
    optimizers = [part.optimizer for part in learner.optimizer.parts if part.optimizer is not None]
    teacher = learner.teacher.chunks if learner.teacher is not None else []
    device = learner.device.type
    seen: set[int] = set()
    return {
        "parameters": _count(parameters, device, seen),
        "gradients": _count((one.main_grad for one in parameters if hasattr(one, "main_grad")), device, seen),
        "optimizer": _count((tensor for optimizer in optimizers for tensor in _state(optimizer)), device, seen),
        "teacher": _count((one for chunk in teacher for one in chunk.parameters()), device, seen),
    }


def _buffers(chunk: torch.nn.Module) -> Iterator[Tensor]:
    # megatron-core's wrapper has another `buffers`, those of gradients.
    return torch.nn.Module.buffers(chunk)


def _state(optimizer: Any) -> Iterator[Tensor]:
    """Yield what an optimizer updates and what it keeps for it."""
    for group in optimizer.param_groups:
        yield from group["params"]
    for state in optimizer.state.values():
        yield from (value for value in state.values() if torch.is_tensor(value))


def _count(tensors: Iterable[Tensor], device: str, seen: set[int]) -> int:
    total = 0
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if tensor.device.type == device and storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            total += storage.nbytes()
    return total


def _size(number: int) -> str:
    return f"{format_size(number)}B" if number >= 1000 else f"{number} B"
