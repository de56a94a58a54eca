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
from tests.support.conditioned_runs import (
    BF16,
    FP8,
    FP32,
    NUM_STEPS,
    REFERENCE,
    TF32,
    Format,
    check_curve,
    check_gradients,
    conditioned_config,
    first_gradients,
)
from tests.support.tiny_runs import run_steps

pytestmark = pytest.mark.gpu

SHARDED = {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}
PACKED = {"seq_length": 128, "reset_attention_mask": True}
UNCLIPPED = {"lr": 3e-4, "clip_grad": 0.0}
IN_FP8 = {"params_dtype": "bf16", "fp8": "hybrid"}


@dataclasses.dataclass(frozen=True)
class Variant:
    """Layers, number formats and optimizer, and the format that decides how near FP32 it must stay."""

    impl: str
    precision: dict[str, Any]
    number_format: Format
    parallel: dict[str, Any] = dataclasses.field(default_factory=dict)


LOCAL_FP32 = Variant("local", {"params_dtype": "fp32"}, FP32)
VARIANTS = {
    "local fp32": LOCAL_FP32,
    "local bf16": Variant("local", {"params_dtype": "bf16"}, BF16),
    "TE fp32": Variant("transformer_engine", {"params_dtype": "fp32"}, TF32),  # its products are in TF32
    "TE bf16": Variant("transformer_engine", {"params_dtype": "bf16"}, BF16),
    "TE bf16, sharded": Variant("transformer_engine", {"params_dtype": "bf16"}, BF16, SHARDED),
    "TE fp8": Variant("transformer_engine", IN_FP8, FP8),
    "TE fp8 parameters": Variant("transformer_engine", {**IN_FP8, "fp8_param_gather": True}, FP8, SHARDED),
    "TE fp8, bf16 moments": Variant("transformer_engine", {**IN_FP8, "optimizer_state_dtype": "bf16"}, FP8, SHARDED),
}


def gpu_config(variant: Variant, **sections: dict[str, Any]) -> RunConfig:
    """Return the conditioned run of a variant."""
    if variant.impl == "transformer_engine" and importlib.util.find_spec("transformer_engine") is None:
        pytest.skip("Transformer Engine is not installed")
    return conditioned_config(variant.impl, variant.precision, variant.parallel, **sections)


def build(config: RunConfig) -> Any:
    from megatron_7b.training.learner import build_learner

    return build_learner(config, "cuda")


def curve(config: RunConfig) -> list[tuple[float, float]]:
    """Loss and gradient norm of every step of a fresh run, of which nothing is left."""
    from megatron_7b.parallel.groups import leaving_process_groups

    with leaving_process_groups():
        return run_steps(build(config), range(NUM_STEPS))


def gradients(variant: Variant, **data: object) -> dict[str, torch.Tensor]:
    """The first gradient of every parameter of a fresh run."""
    from megatron_7b.parallel.groups import leaving_process_groups

    with leaving_process_groups():
        return first_gradients(build(gpu_config(variant, optimizer=UNCLIPPED, data={"seq_length": 128, **data})))


@pytest.mark.parametrize("name", ["local bf16", "TE bf16"])
def test_packed_documents_follow_fp32(name: str) -> None:
    """Transformer Engine's packed kernels (thd) against an attention per document."""
    expected = curve(gpu_config(LOCAL_FP32, data=PACKED))
    print(name, check_curve(curve(gpu_config(VARIANTS[name], data=PACKED)), expected, VARIANTS[name].number_format))
    apart = {"reset_attention_mask": True}
    actual, right = gradients(VARIANTS[name], **apart), gradients(LOCAL_FP32, **apart)
    print(name, check_gradients(actual, right, VARIANTS[name].number_format))


@pytest.mark.parametrize("name", VARIANTS)
def test_training_follows_a_cpu_in_fp32(name: str) -> None:
    """Twenty steps, within what the number format explains."""
    print(name, check_curve(curve(gpu_config(VARIANTS[name])), REFERENCE, VARIANTS[name].number_format))


@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "local fp32"])
def test_every_gradient_follows_fp32(name: str) -> None:
    print(name, check_gradients(gradients(VARIANTS[name]), gradients(LOCAL_FP32), VARIANTS[name].number_format))


@pytest.mark.parametrize("name", VARIANTS)
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


def test_groups_take_no_memory_before_they_are_used() -> None:
    """What NCCL holds is outside of torch's allocator, so it shows only in what the device has left."""
    free, _ = torch.cuda.mem_get_info()
    core = build(gpu_config(LOCAL_FP32))
    torch.cuda.synchronize()
    taken = free - torch.cuda.mem_get_info()[0] - torch.cuda.memory_reserved()
    assert core.layout.world_size == 1
    assert taken < 2**30


def test_initial_weights_are_those_of_the_cpu() -> None:
    """The seed and the names decide, not the device."""
    from megatron_7b.model.builder import named_canonical_parameters
    from megatron_7b.model.initialization import draw_rows

    core = build(gpu_config(LOCAL_FP32))
    weights = dict(named_canonical_parameters([chunk.module for chunk in core.model]))
    rows = draw_rows("embedding.word_embeddings.weight", 128, 0, 1009, seed=core.config.training.seed, std=0.02)
    assert torch.equal(weights["embedding.word_embeddings.weight"][:1009].cpu(), rows)
