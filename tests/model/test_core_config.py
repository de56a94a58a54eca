"""What megatron-core is told of a run on GPUs, as far as that shows without one."""

import pytest

from megatron_7b.errors import ConfigError
from megatron_7b.model.core_config import build_transformer_config
from megatron_7b.model.kernels import resolve_transformer_impl
from tests.support.tiny_runs import tiny_config


@pytest.mark.parametrize("virtual_size", [None, 2])
def test_stages_on_gpus_communicate_in_one_of_two_ways(virtual_size: int | None) -> None:
    """megatron-core's interleaved schedule refuses batched communication together with overlapped."""
    layout = {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": virtual_size}
    core = build_transformer_config(
        tiny_config(parallel=layout), device_type="cuda", impl="local", core_layers_per_layer=2
    )
    assert (core.batch_p2p_comm, core.overlap_p2p_comm) == (virtual_size is None, virtual_size is not None)


def test_recompute_and_graphs_are_handed_on() -> None:
    config = tiny_config(
        parallel={"recompute_granularity": "selective", "recompute_modules": ("mlp",)},
        runtime={"cuda_graph_impl": "local"},
    )
    on_gpu = build_transformer_config(config, device_type="cuda", impl="local", core_layers_per_layer=2)
    assert (on_gpu.recompute_modules, on_gpu.cuda_graph_impl) == (["mlp"], "local")
    on_cpu = build_transformer_config(config, device_type="cpu", impl="local", core_layers_per_layer=2)
    assert on_cpu.cuda_graph_impl == "none"


def test_graphs_are_refused_without_transformer_engine() -> None:
    config = tiny_config(model={"transformer_impl": "auto"}, runtime={"cuda_graph_impl": "local"})
    with pytest.raises(ConfigError, match="runtime.cuda_graph_impl is 'local', which needs Transformer Engine"):
        resolve_transformer_impl(config, "cpu")


@pytest.mark.parametrize(
    ("wanted", "with_engine"), [("auto", "te"), ("te", "te"), ("full", "full"), ("chunked", "chunked")]
)
def test_who_computes_the_loss(wanted: str, with_engine: str) -> None:
    """megatron-core is told of Transformer Engine's kernel alone; what is chunked never asks it."""
    config = tiny_config(model={"transformer_impl": "auto"}, runtime={"cross_entropy_impl": wanted})
    assert config.cross_entropy_impl(has_transformer_engine=True) == with_engine
    on_gpu = build_transformer_config(config, device_type="cuda", impl="local", core_layers_per_layer=2)
    assert on_gpu.cross_entropy_loss_fusion == (wanted == "te")
    assert on_gpu.cross_entropy_fusion_impl == "te"


def test_smoothing_and_teachers_need_the_loss_in_chunks() -> None:
    for sections in ({"finetune": {"label_smoothing": 0.1}}, {"distillation": {"teacher": "T"}}):
        assert tiny_config(**sections).cross_entropy_impl(has_transformer_engine=True) == "chunked"
