"""What a teacher costs beside the model that learns from it: its weights, its last states, and its forward passes."""

from dataclasses import replace

from megatron_7b.config.adapters import AdapterConfig
from megatron_7b.config.schema import ModelConfig, RunConfig
from megatron_7b.parallel import ParallelLayout
from megatron_7b.planning.counts import ModelCounts
from megatron_7b.planning.devices import Device
from megatron_7b.planning.memory import RankMemory, working_width
from megatron_7b.planning.step_time import StepTime, StepTimer

_FORWARD = 1 / 3
"""Of forward and backward together."""


class Teacher:
    """Adds to a plan what a teacher takes at the layout of its student.

    Args:
        model: Its shape.
        device: Of each rank.
    """

    def __init__(self, model: ModelConfig, device: Device) -> None:
        self._model, self._device = model, device
        self._counts = ModelCounts(model)
        self._timer = StepTimer(self._counts, device)

    def taught(self, config: RunConfig) -> RunConfig:
        """Return the run as if the teacher were its model: what a layout must divide as well."""
        plain = replace(
            config.parallel, recompute_granularity="none", recompute_method="uniform", recompute_num_layers=1
        )
        return replace(config, model=self._model, parallel=plain, adapter=AdapterConfig())

    def add_memory(self, memory: RankMemory, config: RunConfig, layout: ParallelLayout) -> RankMemory:
        """Return what a rank holds with its part of the teacher, whose activations come and go."""
        width, training = working_width(config, self._device), config.training
        if config.distillation.teacher_dtype != "auto":
            width = 2 if config.distillation.teacher_dtype == "bf16" else 4
        weights = width * self._counts.elements(layout, "all", lambda _group: True)
        states = 0
        if (
            layout.is_last_stage and not self._model.has_head
        ):  # last hidden states of all microbatches; logits are made chunk by chunk
            tokens = training.global_batch_size * config.data.seq_length // (layout.dp_size * layout.cp_size)
            divided = layout.tp_size if config.parallel.sequence_parallel else 1
            states = width * tokens * self._model.hidden_size // divided
        return replace(memory, parameters=memory.parameters + weights, activations=memory.activations + states)

    def add_time(self, time: StepTime, config: RunConfig, layout: ParallelLayout) -> StepTime:
        """Return the time of a step with the teacher's forward passes."""
        own = self._timer.step_time(self.taught(config), layout)
        parts = ("matrix_products", "attention", "memory_bound", "tensor_parallel", "context_parallel", "pipeline")
        return replace(time, **{name: getattr(time, name) + _FORWARD * getattr(own, name) for name in parts})
