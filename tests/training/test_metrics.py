"""Records, their lines, and the figures derived from a step's time."""

import json
import math

import pytest

from megatron_7b.config import load_config
from megatron_7b.runtime.machine.hardware import device_name, peak_memory_bytes
from megatron_7b.runtime.machine.peak_rates import peak_tflops
from megatron_7b.training.metrics import (
    StepMetrics,
    Throughput,
    ValidationMetrics,
    build_throughput,
    format_count,
    perplexity,
    to_json,
)


def step_metrics(**fields: object) -> StepMetrics:
    values: dict[str, object] = {
        "step": 3, "consumed_samples": 48, "consumed_tokens": 12288, "loss": 3.25, "learning_rate": 1e-3,
        "grad_norm": 1.5, "step_seconds": 0.25, "tokens_per_second": 16384.0, "tflops_per_device": 0.5, "mfu": None,
        "memory_bytes": 10**9, "skipped": False,
    }  # fmt: skip
    return StepMetrics(**{**values, **fields})  # type: ignore[arg-type]


def test_a_line_says_what_the_record_says() -> None:
    metrics = step_metrics(extra={"sentence_order_loss": 0.5})
    written = json.loads(to_json(metrics))
    assert written.pop("sentence_order_loss") == 0.5
    assert written == {
        name: value for name, value in vars(metrics).items() if name not in ("extra", "timing", "memory", "norms")
    }


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_what_json_does_not_know_is_null(loss: float) -> None:
    line = json.loads(to_json(step_metrics(loss=loss, skipped=True)), parse_constant=pytest.fail)
    assert line["loss"] is None
    assert line["skipped"] is True


def test_kinds_of_lines_are_told_apart_by_their_fields() -> None:
    validation = ValidationMetrics(
        step=3, consumed_samples=48, consumed_tokens=12288, validation_loss=2.0, validation_perplexity=perplexity(2.0),
        validation_tokens=512, validation_seconds=0.1,
    )  # fmt: skip
    line = json.loads(to_json(validation))
    assert "loss" not in line
    assert line["validation_perplexity"] == pytest.approx(math.e**2)


def test_perplexity_beyond_a_float_is_infinite() -> None:
    assert perplexity(1e4) == math.inf


def test_rates() -> None:
    rates = Throughput(flops_per_token=6e9, num_devices=4, peak_tflops=50.0).rates(8000, 0.5)
    assert rates == pytest.approx((16000.0, 24.0, 0.48))
    assert Throughput(flops_per_token=6e9, num_devices=4, peak_tflops=None).rates(8000, 0.5)[2] is None


def test_published_figures_of_a_7b_run_come_out() -> None:
    """Llama 2 7B at s 4096 on 8 H100: 16,934 tokens/s per GPU (NeMo 24.12, FP8). Its FLOPs per token, by hand:
    6 per weight that multiplies, and 6·s·h per layer for causal attention."""
    config = load_config("llama2_7b_8xh100_fp8")
    throughput = build_throughput(config, world_size=8, device_type="cpu")
    weights = 32 * (4 * 4096**2 + 3 * 4096 * 11008) + 32000 * 4096
    assert throughput.flops_per_token == 6 * weights + 32 * 6 * config.data.seq_length * 4096
    _, tflops, mfu = throughput.rates(8 * 16934, 1.0)
    assert tflops == pytest.approx(16934 * throughput.flops_per_token / 1e12)
    assert mfu is None  # of a CPU nothing is promised


@pytest.mark.parametrize(
    ("name", "bf16", "fp8"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4, 1978.9),
        ("NVIDIA H100 PCIe", 756.0, 1513.0),
        ("NVIDIA H100 NVL", 835.5, 1670.5),
        ("NVIDIA H200", 989.4, 1978.9),
        ("NVIDIA H20", 148.0, 296.0),
        ("NVIDIA GH200 480GB", 989.4, 1978.9),
        ("NVIDIA A100-SXM4-80GB", 311.9, None),
        ("NVIDIA B200", 2250.0, 4500.0),
        ("NVIDIA GB200", 2500.0, 5000.0),
        ("NVIDIA L40S", 362.1, 733.0),
        ("NVIDIA L40", 181.1, 362.1),
        ("NVIDIA L4", 121.0, 242.0),
        ("NVIDIA GeForce RTX 4090", 165.2, 330.3),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None, None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None, None),
        ("Tesla V100-SXM2-32GB", None, None),
    ],
)
def test_peaks_by_device_name(name: str, bf16: float | None, fp8: float | None) -> None:
    assert peak_tflops(name, "bf16") == bf16
    assert peak_tflops(name, "fp8") == fp8
    assert peak_tflops(name, "fp32") is None


def test_memory_is_this_programs_and_only_grows() -> None:
    before = peak_memory_bytes("cpu")
    held = bytearray(200_000_000)
    held[::4096] = b"x" * len(held[::4096])
    grown = peak_memory_bytes("cpu")
    assert grown >= before
    assert grown > 200_000_000
    del held
    assert peak_memory_bytes("cpu") > 0.99 * grown  # the kernel adds up per-thread counts only now and then


def test_the_device_has_a_name() -> None:
    assert device_name("cpu")


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (7, "7"),
        (999, "999"),
        (1000, "1k"),
        (19_540, "19.5k"),
        (999_900, "1M"),
        (6.738e9, "6.74B"),
        (2e12, "2T"),
    ],
)
def test_counts_have_three_digits(number: float, text: str) -> None:
    assert format_count(number) == text
