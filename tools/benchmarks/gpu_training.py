"""Training steps, timed: ours and transformers', with the memory they take and the kernels they run."""

import dataclasses
import re
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from gpu_steps import BASE, Shape

from megatron_7b.config import RunConfig, load_config
from megatron_7b.model.memory import training_need
from megatron_7b.model.sizes import count_parameters, flops_per_token
from megatron_7b.runtime.machine.device import DeviceType

WARM_UP, TIMED = 2, 3
"""Steps before those that count, and how many count: their median."""
SHARE_OF_MEMORY = 0.92
"""Of the device, that a run may take by the estimate."""

_BACKWARD = re.compile(r"bprop|bwd|backward", re.IGNORECASE)


def synchronize(device: str) -> None:
    """Wait until the device has done all that it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def configuration(shape: Shape, options: Mapping[str, Any], device: str, *, is_tiny: bool) -> RunConfig:
    """Return a run of a shape with as many layers as the device's memory holds."""
    settings: dict[str, Any] = {
        "data.seq_length": shape.seq_length,
        "training.micro_batch_size": shape.micro_batch_size,
        "training.global_batch_size": shape.micro_batch_size * shape.num_microbatches,
        "runtime.device": device,
        "precision.params_dtype": "bf16",
        **BASE,
        **options,
    }
    if is_tiny:
        settings |= {"model.vocab_size": 512, "model.num_layers": shape.most_layers, "runtime.num_threads": 1}
        settings |= {"precision.optimizer_state_dtype": "fp32"}  # else it needs Transformer Engine
        return load_config(shape.preset, settings)
    total = torch.cuda.mem_get_info()[1]
    for layers in range(shape.most_layers, 0, -1):
        config = load_config(shape.preset, {**settings, "model.num_layers": layers})
        if estimated_bytes(config) <= SHARE_OF_MEMORY * total:
            return config
    raise SystemExit(f"not even one layer of {shape.preset} fits into {total / 1e9:.0f} GB")


def estimated_bytes(config: RunConfig) -> float:
    """Return about how much a training step on one device takes.

    What is kept of a layer for the backward pass was fitted to a measured run (2 × (6h + 3f) bytes per token); of the
    logits there are one copy in BF16 and two in FP32.
    """
    from megatron_7b.parallel.layout import build_layout

    model, training = config.model, config.training
    layout = build_layout(config.parallel, world_size=1, rank=0)
    states = dataclasses.replace(training_need(config, layout, bytes_per_parameter=2), activations=0).total
    tokens = training.micro_batch_size * config.data.seq_length
    kept = 2 * (6 * model.hidden_size + 3 * model.ffn_hidden_size) * model.num_layers
    if config.parallel.recompute_granularity == "full":
        kept = 2 * model.hidden_size * model.num_layers
    return states + tokens * (kept + 10 * (model.vocab_size or 0))


def time_ours(
    shape: Shape, options: Mapping[str, Any], device: DeviceType, *, is_tiny: bool, profile: bool
) -> dict[str, Any]:
    """Build a model with random weights and time whole steps."""
    from megatron_7b.data import Batch
    from megatron_7b.model import builder
    from megatron_7b.runtime.process.distributed import initialize_process
    from megatron_7b.training.learner import build_learner
    from megatron_7b.training.step import train_step

    started = time.perf_counter()
    config = configuration(shape, options, device, is_tiny=is_tiny)
    builder.initialize_parameters = draw_on_device  # the real one draws on the CPU, 25 s for 7 B
    learner = build_learner(config, initialize_process(config.runtime))
    build_seconds = time.perf_counter() - started
    size, s = shape.micro_batch_size, shape.seq_length
    random, positions = np.random.default_rng(0), np.broadcast_to(np.arange(s), (size, s)).copy()

    def step() -> tuple[float, float]:
        batches = []
        for _ in range(shape.num_microbatches):
            ids = random.integers(0, config.model.vocab_size or 0, size=(size, s + 1))
            mask = np.ones((size, s), dtype=np.float32)
            batches.append(Batch(ids[:, :-1].copy(), ids[:, 1:].copy(), mask, positions))
        result = train_step(learner, batches, 1e-4)
        return result.loss, result.grad_norm

    result = {"contender": "megatron_7b", "layers": learner_layers(learner), "build_seconds": round(build_seconds, 1)}
    result |= time_steps(step, config, device)
    result["memory"] = memory_by_kind(learner, device)
    if profile:
        result["kernels"] = kernels_by_part(step, device)
    return result


def learner_layers(learner: Any) -> str:
    """Return which implementation the layers are of."""
    from megatron_7b.model.kernels import resolve_transformer_impl

    return resolve_transformer_impl(learner.config, learner.on_ranks.device_type)[0]


@torch.no_grad()
def draw_on_device(chunks: Any, *_model: object, **_seed: object) -> None:
    """Fill parameters with random values where they are: as good as others for the speed."""
    from megatron_7b.model.builder import named_canonical_parameters

    for name, parameter in named_canonical_parameters(chunks):
        if parameter.dim() == 1:
            values = torch.full(parameter.shape, float("norm" in name), device=parameter.device)
        else:
            values = torch.empty(parameter.shape, device=parameter.device, dtype=torch.bfloat16).normal_(0, 0.02)
        parameter.copy_(values)
        if hasattr(parameter, "get_high_precision_init_val"):  # beside a parameter in FP8
            parameter.get_high_precision_init_val().copy_(values)


def time_steps(step: Callable[[], tuple[float, float]], config: RunConfig, device: str) -> dict[str, Any]:
    """Do steps; returns rates by the median of those that count."""
    seconds = []
    for _ in range(WARM_UP + TIMED):
        synchronize(device)
        started = time.perf_counter()
        loss, norm = step()
        synchronize(device)
        seconds.append(time.perf_counter() - started)
    median, tokens = statistics.median(seconds[WARM_UP:]), config.training.global_batch_size * config.data.seq_length
    return {
        "num_layers": config.model.num_layers,
        "parameters": count_parameters(config.model),
        "tokens_per_step": tokens,
        "first_step_seconds": round(seconds[0], 2),
        "step_seconds": round(median, 4),
        "spread": round((max(seconds[WARM_UP:]) - min(seconds[WARM_UP:])) / median, 3),
        "tokens_per_second": round(tokens / median, 1),
        "tflops": round(tokens / median * flops_per_token(config.model, config.data.seq_length) / 1e12, 2),
        "loss": round(loss, 3),
        "grad_norm": round(norm, 3),
        **peak_memory(device),
    }


def peak_memory(device: str) -> dict[str, int]:
    """Return what torch's allocator says of its memory, and the device of all of it."""
    if device != "cuda":
        return {}
    free, total = torch.cuda.mem_get_info()
    return {
        "peak_bytes": torch.cuda.max_memory_allocated(),
        "reserved_bytes": torch.cuda.memory_reserved(),
        "device_bytes": total - free,
    }


def memory_by_kind(learner: Any, device: str) -> dict[str, int]:
    """Return what a step's memory is for [bytes]; after a step. Parameters count with the width of their dtype.

    On a CPU that is what tensors say of themselves; all else needs an allocator that counts.
    """
    parameters = sum(p.numel() * p.element_size() for chunk in learner.model for p in chunk.parameters())
    buffers = [buffer for chunk in learner.model for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    gradients = sum(buffer.grad_data.nbytes for buffer in buffers)
    if device != "cuda":
        return {"parameters": parameters, "gradients": gradients}
    held, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
    free, total = torch.cuda.mem_get_info()
    return {
        "parameters": parameters,
        "gradients": gradients,
        "optimizer": held - parameters - gradients,
        "activations and temporary": peak - held,
        "fragmented": torch.cuda.memory_reserved() - peak,
        "outside of torch (context, libraries, NCCL)": total - free - torch.cuda.memory_reserved(),
    }


def kernels_by_part(step: Callable[[], object], device: str) -> dict[str, Any]:
    """Profile one step; returns milliseconds by part, how long the device was busy, and the longest kernels."""
    from torch.profiler import ProfilerActivity, profile

    on_gpu = device == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiler:
        step()
        synchronize(device)
    parts: dict[str, float] = {}
    names: dict[str, list[float]] = {}
    spans = []
    for event in profiler.events():
        if on_gpu and event.device_type != torch.autograd.DeviceType.CUDA:
            continue
        milliseconds = (event.time_range.elapsed_us() if on_gpu else event.self_cpu_time_total) / 1e3
        part = part_of(event.name)
        parts[part] = parts.get(part, 0.0) + milliseconds
        names.setdefault(event.name, []).append(milliseconds)
        spans.append((event.time_range.start, event.time_range.end))
    longest = sorted(names, key=lambda name: -sum(names[name]))[:15]
    return {
        "parts_ms": {part: round(parts[part], 2) for part in sorted(parts, key=parts.__getitem__, reverse=True)},
        "num_kernels": len(spans),
        "busy_ms": round(covered(spans) / 1e3, 2),
        "span_ms": round((max(end for _, end in spans) - min(start for start, _ in spans)) / 1e3, 2),
        "longest": [[name[:100], len(names[name]), round(sum(names[name]), 2)] for name in longest],
    }


def part_of(kernel: str) -> str:
    """Return which part of a step a kernel belongs to, by its name; attention forward and backward are apart."""
    from megatron_7b.training.trace_table import part_of_kernel

    part = part_of_kernel(kernel)
    return f"{part}, backward" if part == "attention" and _BACKWARD.search(kernel) else part


def covered(spans: list[tuple[float, float]]) -> float:
    """Return how much of the time at least one of the spans covers."""
    total, end = 0.0, float("-inf")
    for first, last in sorted(spans):
        total += max(0.0, last - max(first, end))
        end = max(end, last)
    return total


def time_transformers(shape: Shape, device: str, *, is_tiny: bool) -> dict[str, Any]:
    """Time the same shape and batch in transformers: pure BF16, SDPA, fused AdamW."""
    import transformers

    config = configuration(shape, {}, device, is_tiny=is_tiny)
    model, threads = config.model, config.runtime.num_threads
    if threads is not None:
        torch.set_num_threads(threads)
    shared = {
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.query_groups,
        "max_position_embeddings": model.max_position_embeddings,
        "tie_word_embeddings": model.share_embeddings_and_output_weights,
        "use_cache": False,
        "attn_implementation": "sdpa",
    }
    family = "Qwen2" if model.architecture == "qwen2" else "Llama"
    started = time.perf_counter()
    with torch.device(device):
        torch.set_default_dtype(torch.bfloat16)
        network = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**shared))
        torch.set_default_dtype(torch.float32)
    adam = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)
    build_seconds, random = time.perf_counter() - started, np.random.default_rng(0)

    def step() -> tuple[float, float]:
        adam.zero_grad()
        total = torch.zeros((), device=device)
        for _ in range(shape.num_microbatches):
            size = (shape.micro_batch_size, shape.seq_length)
            ids = torch.from_numpy(random.integers(0, model.vocab_size or 0, size=size)).to(device)
            loss = network(input_ids=ids, labels=ids).loss / shape.num_microbatches
            loss.backward()
            total += loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        adam.step()
        return float(total), float(norm)

    result = {"contender": f"transformers {transformers.__version__}", "build_seconds": round(build_seconds, 1)}
    return result | time_steps(step, config, device)
