"""Layers, number formats and optimizers that are compared with FP32 on a CPU: by tests/gpu, and by benchmarks."""

import dataclasses
from typing import Any

import torch

from megatron_7b.config.schema import RunConfig
from tests.support.conditioned_runs import (
    BF16,
    FP8,
    FP32,
    NUM_STEPS,
    TF32,
    Format,
    conditioned_config,
    first_gradients,
)
from tests.support.tiny_runs import run_steps

SHARDED = {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}
UNCLIPPED = {"lr": 3e-4, "clip_grad": 0.0}
GRAPHS = {"cuda_graph_impl": "local"}
CHUNKED, FULL = {"cross_entropy_impl": "chunked"}, {"cross_entropy_impl": "full"}
RECOMPUTED = {"recompute_granularity": "selective", "recompute_modules": ("core_attn", "mlp")}
IN_FP8 = {"params_dtype": "bf16", "fp8": "hybrid"}


@dataclasses.dataclass(frozen=True)
class Variant:
    """Layers, number formats and optimizer, and the format that decides how near FP32 it must stay."""

    impl: str
    precision: dict[str, Any]
    number_format: Format
    parallel: dict[str, Any] = dataclasses.field(default_factory=dict)
    runtime: dict[str, Any] = dataclasses.field(default_factory=dict)
    cpu_offload: bool = False

    def config(self, **sections: dict[str, Any]) -> RunConfig:
        """Return the conditioned run of this variant; sections override fields."""
        own = {"runtime": self.runtime, "optimizer": {"cpu_offload": self.cpu_offload}}
        both = {name: {**own.get(name, {}), **sections.get(name, {})} for name in {*own, *sections}}
        return conditioned_config(self.impl, self.precision, self.parallel, **both)


LOCAL_FP32 = Variant("local", {"params_dtype": "fp32"}, FP32)
VARIANTS = {
    "local fp32": LOCAL_FP32,
    "local bf16": Variant("local", {"params_dtype": "bf16"}, BF16),
    "TE fp32": Variant("transformer_engine", {"params_dtype": "fp32"}, TF32),  # its products are in TF32
    "TE bf16": Variant("transformer_engine", {"params_dtype": "bf16"}, BF16),
    "TE bf16, sharded": Variant("transformer_engine", {"params_dtype": "bf16"}, BF16, SHARDED),
    "TE bf16, loss in chunks": Variant("transformer_engine", {"params_dtype": "bf16"}, BF16, SHARDED, CHUNKED),
    "TE bf16, loss of full logits": Variant("transformer_engine", {"params_dtype": "bf16"}, BF16, runtime=FULL),
    "TE fp8": Variant("transformer_engine", IN_FP8, FP8),
    "TE fp8, blocks": Variant("transformer_engine", {**IN_FP8, "fp8_recipe": "blockwise"}, FP8),
    "TE fp8 parameters": Variant("transformer_engine", {**IN_FP8, "fp8_param_gather": True}, FP8, SHARDED),
    "TE fp8, bf16 moments": Variant("transformer_engine", {**IN_FP8, "optimizer_state_dtype": "bf16"}, FP8, SHARDED),
    "TE bf16, bf16 gradients and moments": Variant(
        "transformer_engine",
        {"params_dtype": "bf16", "optimizer_state_dtype": "bf16", "grad_reduce_in_fp32": False},
        BF16,
        SHARDED,
    ),
    "TE bf16, moments in host memory": Variant(
        "transformer_engine", {"params_dtype": "bf16"}, BF16, SHARDED, cpu_offload=True
    ),
    "TE bf16, graphs": Variant("transformer_engine", {"params_dtype": "bf16"}, BF16, runtime=GRAPHS),
    "TE fp8, graphs": Variant("transformer_engine", IN_FP8, FP8, runtime=GRAPHS),
    "local bf16, MLPs recomputed": Variant("local", {"params_dtype": "bf16"}, BF16, RECOMPUTED),
}
FIRST = ("local fp32", "local bf16", "TE bf16", "TE fp8")
"""The variants of the quick half."""


def build(config: RunConfig, device: Any) -> Any:
    """Return a fresh learner on the process group of this process, which is made if there is none."""
    from megatron_7b.config.schema import RuntimeConfig
    from megatron_7b.runtime.process.distributed import initialize_process
    from megatron_7b.training.learner import build_learner

    if not torch.distributed.is_initialized():
        initialize_process(
            RuntimeConfig(device=device, deterministic=device == "cuda", num_threads=torch.get_num_threads())
        )
    return build_learner(config, device)


def curve(config: RunConfig, device: Any) -> list[tuple[float, float]]:
    """Loss and gradient norm of every step of a fresh run, of which nothing is left."""
    from megatron_7b.parallel.groups import leaving_process_groups

    with leaving_process_groups():
        return run_steps(build(config, device), range(NUM_STEPS))


def gradients(variant: Variant, device: Any, **data: object) -> dict[str, torch.Tensor]:
    """The first gradient of every parameter of a fresh run."""
    from megatron_7b.parallel.groups import leaving_process_groups

    with leaving_process_groups():
        config = variant.config(optimizer=UNCLIPPED, data={"seq_length": 128, **data})
        return first_gradients(build(config, device))
