"""Which layers of a student are compared with which of its teacher's. Imports no torch."""

import itertools
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
    own_stages, of_teacher_stages = parallel.stage_layers(num_student), parallel.stage_layers(num_teacher)
    for pair in pairs:
        stage, other = _stage(pair.student, own_stages), _stage(pair.teacher, of_teacher_stages)
        if stage != other:
            raise ConfigError(
                f"layer {pair.student} of the student is compared with layer {pair.teacher} of the teacher, which are "
                f"on pipeline stages {stage} and {other} of {parallel.num_stages}",
                hint="choose as many stages as divide both models and leave distillation.layer_map out, use tensor "
                "parallelism instead, or name layers of the same stage in distillation.layer_map: the student's stages "
                f"have {_listed(own_stages)} layers, the teacher's {_listed(of_teacher_stages)}",
            )
    return LayerPair(EMBEDDING, EMBEDDING), *pairs


def _listed(stage_layers: tuple[int, ...]) -> str:
    return ", ".join(map(str, stage_layers))


def _stage(layer: int, stage_layers: tuple[int, ...]) -> int:
    """Return the stage of a layer, both counted from 1."""
    return 1 + sum(layer > end for end in itertools.accumulate(stage_layers))
