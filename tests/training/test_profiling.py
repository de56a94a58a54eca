"""Profiles: which part a kernel is of, what a table adds up, and the files of a run that is profiled."""

import gzip
import json
from pathlib import Path
from typing import Any, override

import pytest

from megatron_7b.config.profile_steps import read_profile_steps
from megatron_7b.config.schema import RunConfig
from megatron_7b.training import pretrain, trace_table
from megatron_7b.training.hooks import Hook
from megatron_7b.training.metrics import StepMetrics
from megatron_7b.training.run import Run
from megatron_7b.training.trace_table import part_of_kernel, read_trace, tabulate
from tests.support.ranks import run_ranks
from tests.training import runs

KERNELS = {
    "nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_NNT": "matrix products",
    "void cutlass::Kernel2<cutlass_80_tensorop_s1688gemm_256x128_16x4_nt_align4>(…)": "matrix products",
    "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_7_64x128x128": "attention",
    "void transformer_engine::normalization::rmsnorm_fwd_tuned_kernel<…>": "norm",
    "void at::native::multi_tensor_apply_kernel<TensorListMetadata<4>, AdamFunctor<float>>": "optimizer",
    "ncclDevKernel_ReduceScatter_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096>)": "communication",
    "Memcpy DtoD (Device -> Device)": "copies",
    "void at::native::(anonymous namespace)::CatArrayBatchedCopy<…>": "copies",
    "triton_poi_fused_cat_mul_silu_0": "activation",
    "void transformer_engine::fused_rope_forward_kernel<__nv_bfloat16>": "rotary embedding",
    "online_softmax_cross_entropy_kernel": "loss",
    "void at::native::vectorized_elementwise_kernel<4, CUDAFunctor_add<float>>": "element-wise",
    "aten::mm": "matrix products",
    "aten::addmm": "matrix products",
    "aten::_fused_adamw_": "optimizer",
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward": "attention",
    "autograd::engine::evaluate_function: _RMSNormBackward": "norm",
    "_ReduceFromModelParallelRegion": "communication",
    "c10d::allreduce_": "communication",
    "aten::embedding_dense_backward": "embedding",
    "forward": "between operators",
    "communication": "communication",
    "something_new": "other",
}


@pytest.mark.parametrize(("name", "part"), KERNELS.items())
def test_a_name_tells_the_part(name: str, part: str) -> None:
    assert part_of_kernel(name) == part


def event(name: str, begin: float, end: float, cat: str = "cpu_op", tid: object = 1) -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "ts": begin, "dur": end - begin, "pid": 7, "tid": tid, "args": {}}


STEPS = [event("step", 0, 1000, "user_annotation"), event("step", 5000, 6000, "user_annotation")]


def test_a_gpu_is_busy_where_any_stream_is() -> None:
    kernels = [
        event("gemm", 100, 500, "kernel", "stream 7"),
        event("nccl", 400, 900, "kernel", "stream 20"),
        event("gemm", 5100, 5200, "kernel", "stream 7"),
        event("aten::mm", 0, 900),  # the operator that starts a kernel is not the kernel
    ]
    table = tabulate([*kernels, *STEPS])
    assert (table.is_of_device, table.num_steps) == (True, 2)
    assert table.seconds == pytest.approx(2e-3)
    assert table.busy_seconds == pytest.approx(0.9e-3)
    assert [(part.part, round(part.seconds * 1e6), part.count) for part in table.parts] == [
        ("matrix products", 500, 2),
        ("communication", 500, 1),
    ]


def test_an_operator_counts_without_those_within_it_and_only_in_steps() -> None:
    operators = [
        event("aten::matmul", 100, 400),
        event("aten::mm", 150, 350),
        event("aten::copy_", 200, 210),
        event("aten::mm", 2000, 4000),  # between steps
        event("aten::mm", 100, 900, tid=2),  # of another thread
        {"ph": "f", "cat": "fwdbwd", "id": 1, "ts": 5},
    ]
    table = tabulate([*operators, *STEPS])
    found = {kernel.name: (round(kernel.seconds * 1e6), kernel.count) for kernel in table.kernels}
    assert found == {"step": (1700, 2), "aten::mm": (190, 1), "aten::matmul": (100, 1), "aten::copy_": (10, 1)}
    assert table.busy_seconds == pytest.approx(300e-6)
    with pytest.raises(ValueError, match="no step"):
        tabulate(operators)


def test_a_trace_is_read_in_pieces_of_any_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "trace.json"
    events = [event(f'a {{"]" {number}', number, number + 1) for number in range(300)]
    text = json.dumps({"schemaVersion": 1, "traceEvents": events, "traceName": "t"}, indent=2)
    path.write_text(text)
    for size in (64, 1000, 1 << 20):
        monkeypatch.setattr(trace_table, "_BLOCK", size)
        assert list(read_trace(path)) == events
    path.write_text(text[: len(text) // 2])
    with pytest.raises(ValueError, match="cut short"):
        list(read_trace(path))
    path.write_text("{}")
    with pytest.raises(ValueError, match="is no trace"):
        list(read_trace(path))


def test_steps_are_a_number_or_a_range() -> None:
    assert read_profile_steps("10-12") == range(10, 13)
    assert read_profile_steps(" 7 ") == range(7, 8)


def test_a_profiled_run_has_a_trace_and_a_table_and_the_same_losses(
    tmp_path: Path,
) -> None:
    short = {"training": {"train_steps": 4, "eval_interval_steps": 0}, "checkpoint": {"save_interval_steps": 0}}
    corpus = runs.write_corpus(tmp_path)
    plain, profiled = tmp_path / "plain", tmp_path / "profiled"
    assert run_ranks(2, runs.pretrain, runs.config(corpus, **short), plain) == [(0, ""), (0, "")]
    asked = {"profile_steps": "2-3", "profile_ranks": (0, 1)}
    assert run_ranks(2, runs.pretrain, runs.config(corpus, **short, telemetry=asked), profiled) == [(0, ""), (0, "")]
    losses = [[line["loss"] for line in runs.steps(folder)] for folder in (plain, profiled)]
    assert losses[0] == losses[1]
    assert not (plain / "profile").exists()
    assert {path.name for path in (profiled / "profile").iterdir()} == {
        f"rank_{rank}_steps_2-3.{end}" for rank in (0, 1) for end in ("trace.json.gz", "txt", "json")
    }
    table = json.loads((profiled / "profile" / "rank_1_steps_2-3.json").read_text())
    assert [table[name] for name in ("rank", "first_step", "last_step", "steps", "device")] == [1, 2, 3, 2, "cpu"]
    assert sum(part["seconds"] for part in table["parts"]) == pytest.approx(table["step_seconds"], rel=1e-3)
    assert {"matrix products", "attention", "norm", "optimizer", "communication", "copies", "data"} <= {
        part["part"] for part in table["parts"]
    }
    text = (profiled / "profile" / "rank_1_steps_2-3.txt").read_text()
    assert text.startswith("Rank 1 of TP1×PP1×DP2 on ")
    assert "aten::mm  [matrix products]" in text
    _check_format(profiled / "profile" / "rank_0_steps_2-3.trace.json.gz")
    assert "profile of steps 2-3: " in (profiled / "train.log").read_text()


class EndingEarly(Hook):
    """Decides after its third step that a run is complete, as early stopping does."""

    @override
    def after_step(self, run: Run, metrics: StepMetrics) -> None:
        if run.step == 3:
            run.finish_early("enough")


def pretrain_until_early_end(config: RunConfig, run_dir: Path) -> int:
    """Entry point of a rank."""
    return pretrain(config, run_dir, hooks=[EndingEarly()])


def test_a_profile_ends_with_a_run_that_another_hook_ends(tmp_path: Path) -> None:
    config = runs.config(runs.write_corpus(tmp_path), telemetry={"profile_steps": "2-5"})
    assert run_ranks(1, pretrain_until_early_end, config, tmp_path / "run") == [0]
    assert (tmp_path / "run" / "profile" / "rank_0_steps_2-3.txt").exists()


def _check_format(path: Path) -> None:
    """What the format asks of events; and that those of one thread are nested, or a viewer draws them askew."""
    with gzip.open(path) as file:
        events = json.load(file)["traceEvents"]
    open_ends: dict[Any, list[float]] = {}
    complete = [one for one in events if one["ph"] == "X"]
    for one in sorted(complete, key=lambda one: (one["ts"], -one["dur"])):
        assert isinstance(one["name"], str)
        assert one["dur"] >= 0
        ends = open_ends.setdefault((one["pid"], one["tid"]), [])
        while ends and ends[-1] <= one["ts"]:
            ends.pop()
        assert not ends or one["ts"] + one["dur"] <= ends[-1] + 1e-3
        ends.append(one["ts"] + one["dur"])
    named = [one["name"] for one in complete if one["cat"] == "user_annotation"]
    assert named.count("step") == 2
    assert named.count("forward") == named.count("backward") == 4
    assert "data" in named
