"""Which layers of a student are compared with which of its teacher's. Imports no torch."""

from typing import NamedTuple

from megatron_7b.config.distillation_config import DistillationConfig
from megatron_7b.config.schema import ModelConfig, ParallelConfig
from megatron_7b.errors import ConfigError

EMBEDDING = 0
"""The place before the first layer."""


class LayerPair(NamedTuple):
    """Places whose hidden states are compared: after layers counted from 1, or 0, after the embedding."""

    student: int
    teacher: int


def find_layer_pairs(
    how: DistillationConfig, student: ModelConfig, teacher: ModelConfig, parallel: ParallelConfig
) -> tuple[LayerPair, ...]:
    """Return the places that are compared, the embedding first.

    Without a map, layer i of n corresponds to layer i * m / n of the teacher's m, rounded up: the last to the last,
    and every layer to one of the same pipeline stage, however many stages divide both models.

    Args:
        how: What is compared.
        student: The shape of the student.
        teacher: That of the teacher.
        parallel: The layout of both.

    Raises:
        ConfigError: The map does not fit the models, or a pair is on different pipeline stages.
    """
    num_student, num_teacher = student.num_layers, teacher.num_layers
    of_teacher = how.layer_map or tuple(-(-layer * num_teacher // num_student) for layer in range(1, num_student + 1))
    if len(of_teacher) != num_student or not all(0 <= layer <= num_teacher for layer in of_teacher):
        raise ConfigError(
            f"distillation.layer_map is {' '.join(map(str, of_teacher))}, expected {num_student} numbers, one for each "
            f"layer of the student: a layer of the teacher, 1 to {num_teacher}, or 0 for none"
        )
    pairs = [LayerPair(layer, other) for layer, other in enumerate(of_teacher, start=1) if other]
    num_stages = parallel.pipeline_model_parallel_size * (parallel.virtual_pipeline_model_parallel_size or 1)
    for pair in pairs:
        stages = _stage(pair.student, num_student, num_stages), _stage(pair.teacher, num_teacher, num_stages)
        if stages[0] != stages[1]:
            raise ConfigError(
                f"distillation.layer_map compares layer {pair.student} with layer {pair.teacher} of the teacher, which "
                f"are on pipeline stages {stages[0]} and {stages[1]} of {num_stages}",
                hint="leave the map out, which keeps pairs together, or use tensor parallelism instead",
            )
    return LayerPair(EMBEDDING, EMBEDDING), *pairs


def _stage(layer: int, num_layers: int, num_stages: int) -> int:
    return (layer - 1) * num_stages // num_layers
