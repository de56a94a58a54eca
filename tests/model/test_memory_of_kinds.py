"""What is counted before a model is built is what its ranks then hold, for every kind and layout."""

from typing import Any

import pytest

from megatron_7b.config.schema import RunConfig
from megatron_7b.model.memory import count_held_parameters
from megatron_7b.parallel import build_layout
from tests.support.ranks import run_ranks
from tests.support.tiny_runs import build, tiny_config


def held(config: RunConfig) -> int:
    """Entry point of a rank: elements of the parameters that it holds."""
    return sum(parameter.numel() for chunk in build(config).model for parameter in chunk.parameters())


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bert", "megatron-bert", "t5"])
def test_counted_is_held(architecture: str, is_tied: bool) -> None:
    stages = 1 if architecture == "t5" else 2
    parallel: dict[str, Any] = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": stages}
    model = {
        "architecture": architecture,
        "num_query_groups": None,
        "num_tokentypes": 2 if "bert" in architecture else 0,
        "share_embeddings_and_output_weights": is_tied,
    }
    config = tiny_config(model=model, parallel=parallel)
    world = 2 * stages
    expected = [
        count_held_parameters(config.model, build_layout(config.parallel, world_size=world, rank=rank))
        for rank in range(world)
    ]
    assert run_ranks(world, held, config) == expected


def test_uneven_stages_are_counted() -> None:
    config = tiny_config(
        parallel={
            "pipeline_model_parallel_size": 2,
            "virtual_pipeline_model_parallel_size": 2,
            "pipeline_model_parallel_layout": (1, 2, 1, 1),
        },
        model={"num_layers": 5},
    )
    expected = [
        count_held_parameters(config.model, build_layout(config.parallel, world_size=2, rank=rank)) for rank in range(2)
    ]
    assert run_ranks(2, held, config) == expected
