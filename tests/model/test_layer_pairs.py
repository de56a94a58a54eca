"""Which layers are compared: evenly by default, on one stage, by a map that fits."""

import pytest

from megatron_7b.config.distillation_config import DistillationConfig
from megatron_7b.config.schema import ModelConfig, ParallelConfig
from megatron_7b.errors import ConfigError
from megatron_7b.model.layer_pairs import find_layer_pairs


def pairs(student: int, teacher: int, stages: int = 1, **how: tuple[int, ...]) -> list[tuple[int, int]]:
    found = find_layer_pairs(
        DistillationConfig(teacher="T", hidden=True, **how),
        ModelConfig(num_layers=student),
        ModelConfig(num_layers=teacher),
        ParallelConfig(pipeline_model_parallel_size=stages),
    )
    assert found[0] == (0, 0)
    return [tuple(pair) for pair in found[1:]]


def test_layers_are_spread_evenly_and_stay_on_their_stage() -> None:
    assert pairs(4, 12) == [(1, 3), (2, 6), (3, 9), (4, 12)]
    assert pairs(4, 6, stages=2) == [(1, 2), (2, 3), (3, 5), (4, 6)]
    assert pairs(4, 2, stages=2) == [(1, 1), (2, 1), (3, 2), (4, 2)]
    assert pairs(2, 8, layer_map=(0, 7)) == [(2, 7)]


def test_maps_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match="expected 2 numbers"):
        pairs(2, 8, layer_map=(1, 2, 3))
    with pytest.raises(ConfigError, match="a layer of the teacher, 1 to 8"):
        pairs(2, 8, layer_map=(1, 9))
    with pytest.raises(ConfigError, match="on pipeline stages 1 and 2 of 2"):
        pairs(2, 8, stages=2, layer_map=(5, 8))
    with pytest.raises(ConfigError, match="as many stages as divide both models"):
        pairs(5, 8, stages=2)
    with pytest.raises(ConfigError, match="the student's stages have 3, 2 layers, the teacher's 4, 4"):
        pairs(5, 8, stages=2)
