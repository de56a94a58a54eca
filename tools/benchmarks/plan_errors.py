#!/usr/bin/env python3
"""How far plans are from what was measured: one GPU of our own, and runs that others have published.

    python tools/benchmarks/plan_errors.py              # prints the table of docs/planning.md

Runs are marked `fitted` if the rates of `planning.devices` and `planning.step_time` were chosen by them; by the others
none was, though their errors were in view. Published TFLOP/s count attention in several ways, so tokens per second are
compared.
"""

from dataclasses import dataclass, field

from megatron_7b.config import load_config
from megatron_7b.config.schema import RunConfig
from megatron_7b.model.sizes import flops_per_token
from megatron_7b.planning import plan
from megatron_7b.planning.candidate import Candidate
from megatron_7b.planning.devices import GPUS
from megatron_7b.planning.layouts import layout_of
from megatron_7b.planning.planner import Planner

_LLAMA_8_LAYERS = {"model.num_layers": 8}
_LLAMA_13B = {
    "model.num_layers": 40, "model.hidden_size": 5120, "model.ffn_hidden_size": 13824, "model.num_attention_heads": 40,
    "model.num_query_groups": 40,
}  # fmt: skip
_LLAMA2_70B = {
    "model.num_layers": 80, "model.hidden_size": 8192, "model.ffn_hidden_size": 28672, "model.num_attention_heads": 64,
    "model.num_query_groups": 8,
}  # fmt: skip
_LLAMA3_405B = {
    "model.num_layers": 126, "model.hidden_size": 16384, "model.ffn_hidden_size": 53248,
    "model.num_attention_heads": 128, "model.num_query_groups": 8,
}  # fmt: skip
_FULL = {"runtime.cross_entropy_impl": "full"}
_BF16 = {"precision.params_dtype": "bf16"}
_FP8 = {"precision.params_dtype": "bf16", "precision.fp8": "hybrid"}
_SELECTIVE = {"parallel.recompute_granularity": "selective"}


def _gpt(layers: int, hidden: int, heads: int, length: int = 2048, vocabulary: int = 51_200) -> dict[str, object]:
    return {
        "model.num_layers": layers, "model.hidden_size": hidden, "model.ffn_hidden_size": 4 * hidden,
        "model.num_attention_heads": heads, "model.vocab_size": vocabulary, "model.max_position_embeddings": length,
        "model.hidden_dropout": 0.0, "model.attention_dropout": 0.0, "data.seq_length": length,
    }  # fmt: skip


def _layout(
    *, tp: int = 1, pp: int = 1, vpp: int | None = None, cp: int = 1, micro: int, batch: int, ranks: int
) -> dict[str, object]:
    is_sharded = ranks > tp * pp
    return {
        "parallel.tensor_model_parallel_size": tp,
        "parallel.pipeline_model_parallel_size": pp,
        "parallel.virtual_pipeline_model_parallel_size": vpp,
        "parallel.context_parallel_size": cp,
        "parallel.sequence_parallel": tp > 1,
        "parallel.use_distributed_optimizer": is_sharded,
        "parallel.overlap_grad_reduce": is_sharded,
        "parallel.overlap_param_gather": is_sharded,
        "training.micro_batch_size": micro,
        "training.global_batch_size": batch,
    }


@dataclass(frozen=True, kw_only=True)
class PublishedRun:
    """One measured run.

    Attributes:
        name: What ran, where.
        source: Who measured it.
        preset: Of the model.
        overrides: What differs from the preset.
        gpu: One of `planning.devices.GPUS`.
        ranks: How many of them.
        tokens_per_second: Per GPU.
        memory_gb: In torch's allocator, if that was reported.
        is_fitted: Rates were chosen by it.
    """

    name: str
    source: str
    preset: str
    overrides: dict[str, object] = field(default_factory=dict)
    gpu: str = "h100"
    ranks: int
    tokens_per_second: float
    memory_gb: float | None = None
    is_fitted: bool = False

    def config(self) -> RunConfig:
        """Return the run as a configuration."""
        return load_config(self.preset, self.overrides)

    def predicted(self) -> Candidate:
        """Return what a plan says of it."""
        return Planner(self.config(), GPUS[self.gpu]).look_at(self.config(), self.ranks)


OWN, NEMO, BRIDGE = "measured here", "NeMo 24.07", "Megatron-Bridge 25.11"
RUNS = (
    PublishedRun(
        name="Llama 2's shape, 8 layers, s 4096, BF16, 1 × H200", source=OWN, preset="llama2_7b", gpu="h200", ranks=1,
        overrides={**_FULL, **_LLAMA_8_LAYERS, **_BF16, **_layout(micro=2, batch=8, ranks=1),
                   "parallel.use_distributed_optimizer": True},
        tokens_per_second=47_559, memory_gb=44.7, is_fitted=True,
    ),
    PublishedRun(
        name="the same in FP8", source=OWN, preset="llama2_7b", gpu="h200", ranks=1,
        overrides={**_FULL, **_LLAMA_8_LAYERS, **_FP8, **_layout(micro=2, batch=8, ranks=1),
                   "parallel.use_distributed_optimizer": True},
        tokens_per_second=65_221, memory_gb=46.7, is_fitted=True,
    ),
    PublishedRun(
        name="Qwen2.5-7B, s 1024, BF16, BF16 moments, 1 × H200", source=OWN, preset="qwen2_5_7b", gpu="h200", ranks=1,
        overrides={**_FULL, **_BF16, **_layout(micro=4, batch=64, ranks=1), "data.seq_length": 1024,
                   "parallel.use_distributed_optimizer": True, "precision.optimizer_state_dtype": "bf16"},
        tokens_per_second=12_362, memory_gb=114.1,
    ),
    PublishedRun(
        name="Qwen2.5-7B, s 1024, BF16, 1 × H100", source="LLMQ", preset="qwen2_5_7b", ranks=1,
        overrides={**_BF16, **_layout(micro=4, batch=512, ranks=1), "data.seq_length": 1024,
                   "parallel.use_distributed_optimizer": True, "precision.optimizer_state_dtype": "bf16"},
        tokens_per_second=13_863,
    ),
    PublishedRun(
        name="the same in FP8", source="LLMQ", preset="qwen2_5_7b", ranks=1,
        overrides={**_FP8, **_layout(micro=4, batch=512, ranks=1), "data.seq_length": 1024,
                   "parallel.use_distributed_optimizer": True, "precision.optimizer_state_dtype": "bf16"},
        tokens_per_second=19_194,
    ),
    PublishedRun(
        name="Llama 2 7B, FP8, 8 × H100", source="NeMo 24.12", preset="llama2_7b", ranks=8,
        overrides={**_FP8, **_layout(micro=1, batch=128, ranks=8)}, tokens_per_second=16_934, is_fitted=True,
    ),
    PublishedRun(
        name="Llama 2 13B, FP8, PP4 × VPP10, 16 × H100", source=NEMO, preset="llama2_7b", ranks=16,
        overrides={**_LLAMA_13B, **_FP8, **_layout(pp=4, vpp=10, micro=1, batch=128, ranks=16)},
        tokens_per_second=8_646,
    ),
    PublishedRun(
        name="Llama 2 70B, FP8, TP4 × PP4 × VPP20, 64 × H100", source=NEMO, preset="llama2_7b", ranks=64,
        overrides={**_LLAMA2_70B, **_FP8, **_layout(tp=4, pp=4, vpp=20, micro=1, batch=128, ranks=64)},
        tokens_per_second=1_707, is_fitted=True,
    ),
    PublishedRun(
        name="Llama 3 8B, FP8, CP2, 8 × H100", source=NEMO, preset="llama3_8b", ranks=8,
        overrides={**_FP8, **_layout(cp=2, micro=1, batch=128, ranks=8)}, tokens_per_second=12_036,
    ),
    PublishedRun(
        name="Llama 3 8B, FP8, 8 × H100", source=BRIDGE, preset="llama3_8b", ranks=8,
        overrides={**_FP8, **_layout(micro=1, batch=128, ranks=8)}, tokens_per_second=14_451,
    ),
    PublishedRun(
        name="Llama 3 70B, FP8, TP4 × PP4 × CP2 × VPP5, 64 × H100", source=NEMO, preset="llama3_8b", ranks=64,
        overrides={**_LLAMA2_70B, **_FP8, **_layout(tp=4, pp=4, cp=2, vpp=5, micro=1, batch=128, ranks=64)},
        tokens_per_second=1_533,
    ),
    PublishedRun(
        name="Llama 3 70B, FP8, TP4 × PP8 × VPP5, 64 × H100", source=BRIDGE, preset="llama3_8b", ranks=64,
        overrides={**_LLAMA2_70B, **_FP8, **_layout(tp=4, pp=8, vpp=5, micro=1, batch=128, ranks=64)},
        tokens_per_second=1_602,
    ),
    PublishedRun(
        name="Llama 3.1 405B, FP8, TP8 × PP8 × CP2 × VPP8, 1,024 × H100", source=BRIDGE, preset="llama3_8b", ranks=1024,
        overrides={**_LLAMA3_405B, **_FP8, **_layout(tp=8, pp=8, cp=2, vpp=8, micro=1, batch=512, ranks=1024)},
        tokens_per_second=292,
    ),
    PublishedRun(
        name="GPT-3 175B, FP8, TP4 × PP8 × VPP6, 128 × H100", source=NEMO, preset="gpt2", ranks=128,
        overrides={**_gpt(96, 12288, 96), **_FP8, **_layout(tp=4, pp=8, vpp=6, micro=1, batch=256, ranks=128)},
        tokens_per_second=726,
    ),
    PublishedRun(
        name="GPT-3 175B, FP8, TP4 × PP8 × VPP6, 512 × H100", source=NEMO, preset="gpt2", ranks=512,
        overrides={**_gpt(96, 12288, 96), **_FP8, **_layout(tp=4, pp=8, vpp=6, micro=2, batch=2048, ranks=512)},
        tokens_per_second=782,
    ),
    PublishedRun(
        name="Llama 3.1 405B, BF16, TP8 × PP16, 8,192 × H100", source="Llama 3", preset="llama3_8b", ranks=8192,
        overrides={**_LLAMA3_405B, **_BF16, **_layout(tp=8, pp=16, vpp=8, micro=1, batch=2048, ranks=8192)},
        tokens_per_second=430e12 / (6 * 405e9 + 6 * 126 * 8192 * 16384), is_fitted=False,
    ),
    PublishedRun(
        name="Llama 3.1 405B, BF16, TP8 × PP16, 16,384 × H100", source="Llama 3", preset="llama3_8b", ranks=16384,
        overrides={**_LLAMA3_405B, **_BF16, **_layout(tp=8, pp=16, vpp=8, micro=1, batch=2048, ranks=16384)},
        tokens_per_second=400e12 / (6 * 405e9 + 6 * 126 * 8192 * 16384),
    ),
    *(
        PublishedRun(
            name=f"GPT {name}, FP16, {words}, {ranks} × A100", source="Korthikanti et al. 2022", preset="gpt2",
            gpu="a100-80", ranks=ranks,
            overrides={**_gpt(layers, hidden, heads), **_BF16, **_SELECTIVE,
                       **_layout(tp=8, pp=pp, vpp=vpp, micro=micro, batch=batch, ranks=ranks)},
            tokens_per_second=batch * 2048 / seconds / ranks, is_fitted=name == "175B",
        )
        for name, words, layers, hidden, heads, pp, vpp, micro, batch, ranks, seconds in (
            ("22B", "TP8", 48, 6144, 64, 1, None, 4, 4, 8, 1.10),
            ("175B", "TP8 × PP8 × VPP3", 96, 12288, 96, 8, 3, 1, 64, 64, 13.75),
            ("530B", "TP8 × PP35 × VPP3", 105, 20480, 128, 35, 3, 1, 280, 280, 37.83),
            ("1T", "TP8 × PP64", 128, 25600, 160, 64, None, 1, 512, 512, 71.49),
        )
    ),
)  # fmt: skip


def table() -> list[str]:
    """Return the rows of the page: measured or published, predicted, error, and what it was used for."""
    lines = ["| run | source | tokens/s/GPU | predicted | error | used |", "|---|---|---|---|---|---|"]
    for run in RUNS:
        found = run.predicted().tokens_per_second_per_gpu
        error = 100 * (found / run.tokens_per_second - 1)
        used = "fitted" if run.is_fitted else "held out"
        lines.append(
            f"| {run.name} | {run.source} | {run.tokens_per_second:,.0f} | {found:,.0f} | {error:+.0f} % | {used} |"
        )
    return lines


def memory_table() -> list[str]:
    """Return the rows about memory: what torch had allocated at most."""
    lines = ["| run | measured | predicted | error |", "|---|---|---|---|"]
    for run in RUNS:
        if run.memory_gb is not None:
            memory = run.predicted().memory
            found = (memory.total - memory.nccl - memory.context) / 1e9
            lines.append(
                f"| {run.name} | {run.memory_gb:.1f} GB | {found:.1f} GB | {100 * (found / run.memory_gb - 1):+.1f} % |"
            )
    return lines


def scaling_table() -> list[str]:
    """Return Megatron-LM's strong scaling of GPT-3 beside plans of it, whose layouts it does not tell.

    It counts attention as if it were not causal; so do both columns.
    """
    config = load_config("gpt2", {**_gpt(96, 12288, 96, 4096, 131_072), **_BF16, "training.global_batch_size": 1152})
    model = config.model
    causal = flops_per_token(model, 4096)
    counted = causal + 6 * model.num_layers * 4096 * model.hidden_size
    lines = ["| GPUs | published | predicted | layout |", "|---|---|---|---|"]
    for gpus, published in ((96, "47 %"), (576, ""), (1152, ""), (2304, ""), (4608, "42 %")):
        best = plan(config, gpus=gpus, gpu="h100", limit=1).best
        assert best is not None
        layout = layout_of(best.config, gpus)
        lines.append(f"| {gpus:,} | {published} | {100 * best.mfu * counted / causal:.0f} % | {layout} |")
    return lines


if __name__ == "__main__":
    print("\n".join([*table(), "", *memory_table(), "", *scaling_table()]))
