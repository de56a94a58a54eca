"""On CUDA: Transformer Engine in BF16 and FP8 against the torch-native layers in FP32, training, and exact resume.

What the curves are compared with, and how near they must be, is itself checked on a CPU, by
tests/training/test_conditioned_runs.py.
"""

import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_7b.config.schema import RunConfig
from tests.support import gpu_variants
from tests.support.conditioned_runs import BF16, REFERENCE, check_curve, check_gradients
from tests.support.gpu_variants import FIRST, LOCAL_FP32, VARIANTS, Variant
from tests.support.ranks import run_ranks
from tests.support.tiny_runs import run_steps

pytestmark = pytest.mark.gpu

PACKED = {"seq_length": 128, "reset_attention_mask": True}
NAMES = [pytest.param(name, marks=pytest.mark.gpu_quick if name in FIRST else ()) for name in VARIANTS]


def runnable(variant: Variant) -> Variant:
    """Return the variant, or skip the test if what it needs is not installed."""
    if variant.impl == "transformer_engine" and importlib.util.find_spec("transformer_engine") is None:
        pytest.skip("Transformer Engine is not installed")
    return variant


def gpu_config(variant: Variant, **sections: dict[str, Any]) -> RunConfig:
    return runnable(variant).config(**sections)


def build(config: RunConfig) -> Any:
    return gpu_variants.build(config, "cuda")


def curve(config: RunConfig) -> list[tuple[float, float]]:
    return gpu_variants.curve(config, "cuda")


def gradients(variant: Variant, **data: object) -> dict[str, torch.Tensor]:
    return gpu_variants.gradients(runnable(variant), "cuda", **data)


def gradients_on_a_cpu(**data: object) -> dict[str, torch.Tensor]:
    """Entry point of a rank, which computes on the CPU."""
    return gpu_variants.gradients(LOCAL_FP32, "cpu", **data)


@pytest.fixture(scope="module")
def right_gradients() -> dict[str, torch.Tensor]:
    (right,) = run_ranks(1, gradients_on_a_cpu)
    return right


def packed_gradients_on_a_cpu() -> dict[str, torch.Tensor]:
    """Entry point of a rank, which computes on the CPU."""
    return gradients_on_a_cpu(reset_attention_mask=True)


@pytest.mark.parametrize("name", ["local bf16", "TE bf16"])
def test_packed_documents_follow_fp32(name: str) -> None:
    """Transformer Engine's packed kernels (thd) against an attention per document."""
    expected = curve(gpu_config(LOCAL_FP32, data=PACKED))
    print(name, check_curve(curve(gpu_config(VARIANTS[name], data=PACKED)), expected, VARIANTS[name].number_format))
    apart = {"reset_attention_mask": True}
    actual, (right,) = gradients(VARIANTS[name], **apart), run_ranks(1, packed_gradients_on_a_cpu)
    print(name, check_gradients(actual, right, VARIANTS[name].number_format))


@pytest.mark.parametrize("name", NAMES)
def test_training_follows_a_cpu_in_fp32(name: str) -> None:
    """Twenty steps, within what the number format explains."""
    print(name, check_curve(curve(gpu_config(VARIANTS[name])), REFERENCE, VARIANTS[name].number_format))


@pytest.mark.parametrize("name", NAMES)
def test_every_gradient_follows_a_cpu_in_fp32(name: str, right_gradients: dict[str, torch.Tensor]) -> None:
    print(name, check_gradients(gradients(VARIANTS[name]), right_gradients, VARIANTS[name].number_format))


@pytest.mark.parametrize("name", NAMES)
def test_resume_is_exact(name: str, tmp_path: Path) -> None:
    """Parameters, main parameters, moments, and the generators that dropout draws from."""
    from megatron_7b.checkpoint.load import load_checkpoint
    from megatron_7b.checkpoint.manifest import Counters
    from megatron_7b.checkpoint.save import save_checkpoint
    from megatron_7b.parallel.groups import destroy_model_parallel

    config = gpu_config(VARIANTS[name], model={"hidden_dropout": 0.1})
    core = build(config)
    run_steps(core, range(5))
    folder = save_checkpoint(
        tmp_path,
        chunks=core.model,
        optimizer=core.optimizer,
        counters=Counters(step=5, optimizer_steps=5),
        config=config,
        layout=core.layout,
    )
    expected = run_steps(core, range(5, 10))
    destroy_model_parallel()
    core = build(config)
    load_checkpoint(folder, chunks=core.model, optimizer=core.optimizer, layout=core.layout)
    assert run_steps(core, range(5, 10)) == expected


@pytest.mark.parametrize("granularity", ["selective", "full"])
def test_recompute_changes_nothing(granularity: str) -> None:
    recomputed = dataclasses.replace(VARIANTS["local bf16"], parallel={"recompute_granularity": granularity})
    check_curve(curve(gpu_config(recomputed)), curve(gpu_config(VARIANTS["local bf16"])), BF16)


@pytest.mark.gpu_quick
def test_groups_take_no_memory_before_they_are_used() -> None:
    """What NCCL holds is outside of torch's allocator, so it shows only in what the device has left."""
    free, _ = torch.cuda.mem_get_info()
    core = build(gpu_config(LOCAL_FP32))
    torch.cuda.synchronize()
    taken = free - torch.cuda.mem_get_info()[0] - torch.cuda.memory_reserved()
    assert core.layout.world_size == 1
    assert taken < 2**30


@pytest.mark.gpu_quick
def test_initial_weights_are_those_of_the_cpu() -> None:
    """The seed and the names decide, not the device."""
    from megatron_7b.model.builder import named_canonical_parameters
    from megatron_7b.model.initialization import draw_rows

    core = build(gpu_config(LOCAL_FP32))
    weights = dict(named_canonical_parameters([chunk.module for chunk in core.model]))
    rows = draw_rows("embedding.word_embeddings.weight", 128, 0, 1009, seed=core.config.training.seed, std=0.02)
    assert torch.equal(weights["embedding.word_embeddings.weight"][:1009].cpu(), rows)
