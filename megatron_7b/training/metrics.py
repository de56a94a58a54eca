"""What a run reports about each step and validation, and the rates derived from a step's time.

The order and names of the fields are those of metrics.jsonl, which external scripts read.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from megatron_7b.config.schema import PrecisionConfig, RunConfig
from megatron_7b.model.core_config import params_dtype
from megatron_7b.model.sizes import flops_per_token
from megatron_7b.objective import build_objective
from megatron_7b.runtime.machine.device import DeviceType
from megatron_7b.runtime.machine.hardware import device_name
from megatron_7b.runtime.machine.peak_rates import MatmulFormat, peak_tflops
from megatron_7b.training.memory_report import MemoryReport
from megatron_7b.training.norms import Norms
from megatron_7b.training.timing import Timing


@dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """One step, over all ranks."""

    step: int
    """Updates done, this one included."""
    consumed_samples: int
    """Sequences read since the beginning of the run, those of skipped steps included."""
    consumed_tokens: int
    loss: float
    """Mean per token over the global batch, in nats, before the update."""
    learning_rate: float
    grad_norm: float
    """Global L2 norm before clipping."""
    step_seconds: float
    """Wall time of reading the batch, forward, backward and update; without validation, saving and reporting."""
    tokens_per_second: float
    """Tokens read per second, over all devices."""
    tflops_per_device: float
    """Floating-point work of the model itself (causal attention, nothing counted for recomputation), in TFLOP/s."""
    mfu: float | None
    """tflops_per_device as a share of the device's peak; None where no peak is known."""
    memory_bytes: int
    """Most memory that any one rank has held so far: on a GPU, in torch's allocator."""
    device_memory_bytes: int | None = None
    """Most that was taken of any rank's GPU at the end of a step, NCCL and other processes included; None on a CPU."""
    skipped: bool
    """Whether the update was left out because loss or gradient was not finite."""
    extra: Mapping[str, float] = field(default_factory=dict)
    """Further means that the objective reports; in metrics.jsonl each has its own name."""
    timing: Timing | None = None
    """Where the time went since the last report, if there is a report after this step; named alike."""
    memory: MemoryReport | None = None
    """What memory is held for, if there is a report after this step; named alike."""

    norms: Norms | None = None
    """Of gradients and parameters by group, if they were asked for."""

    @property
    def reports(self) -> dict[str, Mapping[str, float]]:
        """The figures of the reports after this step by name, and these by what they are about."""
        found = {"time": self.timing, "memory": self.memory, "norms": self.norms}
        return {topic: report.values for topic, report in found.items() if report is not None}


@dataclass(frozen=True, kw_only=True)
class ValidationMetrics:
    """One validation, over all ranks."""

    step: int
    consumed_samples: int
    consumed_tokens: int
    validation_loss: float
    """Mean per token over all validation batches, in nats."""
    validation_perplexity: float
    """Of the tokens: with a teacher, whose distance is part of the loss, of the task loss alone."""
    validation_tokens: int
    validation_seconds: float
    extra: Mapping[str, float] = field(default_factory=dict)
    """Further means that the objective reports; in metrics.jsonl each has its own name after `validation_`."""


@dataclass(frozen=True, kw_only=True)
class TaskMetrics:
    """What the model at one step does on tasks, over all ranks."""

    step: int
    consumed_samples: int
    consumed_tokens: int
    evaluation_seconds: float
    extra: Mapping[str, float] = field(default_factory=dict)
    """Figures and their standard errors, as `eval/arc_easy/acc` and `eval/arc_easy/acc_stderr`."""


type Metrics = StepMetrics | ValidationMetrics | TaskMetrics


_GROUPS = ("extra", "timing", "memory", "norms")
"""Fields of records that hold figures with names of their own."""


def named_values(metrics: Metrics) -> dict[str, float | None]:
    """Return all values by name, with those that the objective, reports or tasks add."""
    values: dict[str, float | None] = {name: value for name, value in vars(metrics).items() if name not in _GROUPS}
    prefix = "validation_" if isinstance(metrics, ValidationMetrics) else ""
    values |= {f"{prefix}{name}": value for name, value in metrics.extra.items()}
    for figures in metrics.reports.values() if isinstance(metrics, StepMetrics) else ():
        values |= figures
    return values


def to_json(metrics: Metrics) -> str:
    """Return the line of metrics.jsonl, without its newline. JSON knows no NaN and no infinity: they become null."""
    values: dict[str, float | str | None] = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in named_values(metrics).items()
    }
    if isinstance(metrics, StepMetrics) and metrics.timing is not None and metrics.timing.slowest is not None:
        values["slowest_host"] = metrics.timing.slowest.place.host
    return json.dumps(values, allow_nan=False)


def perplexity(loss: float) -> float:
    """Return e^loss, infinite where that is beyond a float."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


@dataclass(frozen=True, kw_only=True)
class Throughput:
    """Turns a step's tokens and seconds into rates; built once per run."""

    flops_per_token: float
    num_devices: int
    peak_tflops: float | None

    def rates(self, num_tokens: int, seconds: float) -> tuple[float, float, float | None]:
        """Return (tokens per second over all devices, TFLOP/s per device, model FLOPs utilisation or None)."""
        tokens_per_second = num_tokens / seconds
        tflops = tokens_per_second * self.flops_per_token / self.num_devices / 1e12
        return tokens_per_second, tflops, tflops / self.peak_tflops if self.peak_tflops else None


def build_throughput(config: RunConfig, *, world_size: int, device_type: DeviceType) -> Throughput:
    """Collect what the rates of a run depend on.

    Args:
        config: Effective configuration of the run, with its true vocabulary size.
        world_size: Number of ranks, one device each.
        device_type: What the ranks compute on; no peak is known of a CPU.
    """
    matmul_format = _matmul_format(config.precision, device_type)
    return Throughput(
        flops_per_token=flops_per_token(
            config.model,
            config.data.seq_length,
            predicted_share=build_objective(config).predicted_share(config),
            is_frozen=config.adapter.is_used,
        ),
        num_devices=world_size,
        peak_tflops=peak_tflops(device_name(device_type), matmul_format) if device_type == "cuda" else None,
    )


def _matmul_format(precision: PrecisionConfig, device_type: DeviceType) -> MatmulFormat:
    if precision.fp8 != "none":
        return "fp8"
    return "bf16" if params_dtype(precision, device_type) is torch.bfloat16 else "fp32"


def format_count(number: float) -> str:
    """Write a count with three significant digits and the unit that language models are counted in: 1.23B, 19.5k."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(number) >= 0.9995 * size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"
