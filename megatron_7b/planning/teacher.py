"""What a teacher costs beside the model that learns from it: its weights, its last states, and its forward passes."""

from dataclasses import replace

from megatron_7b.config.adapters import AdapterConfig
from megatron_7b.config.schema import ModelConfig, RunConfig
from megatron_7b.parallel import ParallelLayout, build_layout
from megatron_7b.planning.counts import ModelCounts
from megatron_7b.planning.devices import Device
from megatron_7b.planning.memory import RankMemory, working_width
from megatron_7b.planning.step_time import StepTime, StepTimer

_FORWARD = 1 / 3
"""Of forward and backward together."""


class Teacher:
    """Adds to a plan what a teacher takes at the layout of its student, or on more tensor-parallel ranks.

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
        tensor = config.distillation.teacher_tensor_model_parallel_size
        if tensor is not None:
            plain = replace(
                plain,
                tensor_model_parallel_size=tensor,
                sequence_parallel=False,
                virtual_pipeline_model_parallel_size=None,
                pipeline_model_parallel_layout=(),
            )
        return replace(config, model=self._model, parallel=plain, adapter=AdapterConfig())

    def _place(self, config: RunConfig, layout: ParallelLayout) -> ParallelLayout:
        """Return where a rank is in the teacher's layout; in its own if the teacher does not fit the ranks."""
        parallel = self.taught(config).parallel
        if layout.world_size % parallel.model_parallel_size:
            return layout
        return build_layout(parallel, world_size=layout.world_size, rank=layout.rank)

    def add_memory(self, memory: RankMemory, config: RunConfig, layout: ParallelLayout) -> RankMemory:
        """Return what a rank holds with its part of the teacher, whose activations come and go."""
        width, training = working_width(config, self._device), config.training
        if config.distillation.teacher_dtype != "auto":
            width = 2 if config.distillation.teacher_dtype == "bf16" else 4
        weights = width * self._counts.elements(self._place(config, layout), "all", lambda _group: True)
        if layout.is_last_stage and config.distillation.teacher_tensor_model_parallel_size is not None:
            vocab_size = config.model.vocab_size or self._model.vocab_size or 0
            weights += width * vocab_size * self._model.hidden_size // layout.tp_size  # its logits are made here
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
        own = self._timer.step_time(self.taught(config), self._place(config, layout))
        parts = ("matrix_products", "attention", "memory_bound", "tensor_parallel", "context_parallel", "pipeline")
        return replace(time, **{name: getattr(time, name) + _FORWARD * getattr(own, name) for name in parts})
