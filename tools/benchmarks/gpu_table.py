"""The results of `gpu.py` as a dated Markdown page, with the goals beside them."""

import datetime as dt
from collections.abc import Iterator, Mapping
from typing import Any

from gpu_steps import SHAPES, STEPS

Results = Mapping[str, Mapping[str, Any] | None]

GOALS = (
    ("Qwen2.5-7B, 1024 tokens, BF16: share of the BF16 peak", "64 %", "60.3 % (LLMQ, H100)"),
    ("Qwen2.5-7B, FP8: tokens/s", "22,000", "19,194 (LLMQ, H100)"),
    ("Llama 2's shape, 4096 tokens, BF16: share of the BF16 peak", "62 %", "–"),
    ("Llama 2's shape: FP8 over BF16", "1.45", "–"),
    ("over transformers on the same shape and batch", "1.4", "–"),
    ("from the command to the first step, 2 B parameters", "15 s", "–"),
    ("`convert`, `generate`, `evaluate` of a small model", "5 s", "–"),
    ("batch-1 decoding of a 7B in BF16: tokens/s", "near 209", "209 (limit of the memory of an H100)"),
)
"""What is measured, the goal, and the best published figure."""


def table(results: Results, *, is_tiny: bool = False) -> str:
    """Return the page.

    Args:
        results: By step; None for those that have not run.
        is_tiny: They are of tiny models.
    """
    note = "**Tiny models: this shows that the steps work, and nothing else.**\n\n" if is_tiny else ""
    parts = (_heading, _goals, _speeds, _correctness, _memory, _kernels, _waiting, _left_out)
    return note + "\n".join(line for part in parts for line in part(results)) + "\n"


def measured(results: Results, step: str) -> Mapping[str, Any] | None:
    """Return what a step has measured; None: nothing."""
    found = results.get(step)
    return found["result"] if found and found["status"] == "measured" else None


def _heading(results: Results) -> Iterator[str]:
    yield f"# One GPU\n\n{dt.datetime.now(tz=dt.UTC).date()}, `python tools/benchmarks/gpu.py`\n"
    facts = measured(results, "environment")
    if facts is None:
        yield "The environment was not recorded.\n"
        return
    engine = facts["no_transformer_engine"]
    yield (
        f"{facts['device']}, commit {facts['commit']}, torch {facts['torch']}, megatron-core {facts['megatron-core']}, "
        f"Transformer Engine {facts['transformer-engine'] or 'none'}{f' ({engine})' if engine else ''}, "
        f"transformers {facts['transformers']}. A large BF16 product reaches {facts['product_tflops']:,} TFLOP/s, "
        f"a copy {facts['copy_gb_per_second']:,} GB/s. FLOPs are those of the causal model; median of three steps "
        "after two others, on random tokens and weights; one run each.\n"
    )


def _rate(results: Results, step: str) -> float | None:
    found = measured(results, step)
    return None if found is None else float(found["tokens_per_second"])


def _share(results: Results, step: str) -> str:
    """Return the share of the peak of the format, in percent."""
    found, facts = measured(results, step), measured(results, "environment") or {}
    peak = facts.get("peak_fp8_tflops" if "fp8" in step else "peak_bf16_tflops")
    return "–" if found is None or not peak else f"{found['tflops'] / peak:.1%}"


def _ratio(results: Results, step: str, other: str) -> str:
    a, b = _rate(results, step), _rate(results, other)
    return "not measured yet" if a is None or b is None else f"{a / b:.2f}"


def _goals(results: Results) -> Iterator[str]:
    qwen, llama, fp8 = (measured(results, step) for step in ("qwen_bf16", "llama_bf16", "qwen_fp8"))
    seconds = (measured(results, "start_up") or {}).get("seconds", {})
    first = [value for name, value in seconds.items() if name.startswith("pretrain until")]
    small = [value for name, value in seconds.items() if name.startswith(("convert", "generate", "evaluate"))]
    decode = (measured(results, "decode") or {}).get("batch_1")
    against = (_ratio(results, f"{shape}_bf16", f"{shape}_transformers") for shape in ("qwen", "llama"))
    values = (
        f"{_share(results, 'qwen_bf16')} ({_layers(qwen, 'qwen')})" if qwen else None,
        f"{fp8['tokens_per_second']:,.0f} ({_layers(fp8, 'qwen')})" if fp8 else None,
        f"{_share(results, 'llama_bf16')} ({_layers(llama, 'llama')})" if llama else None,
        _ratio(results, "llama_fp8", "llama_bf16"),
        "; ".join(f"{name} {ratio}" for name, ratio in zip(("Qwen2.5", "Llama 2"), against, strict=True)),
        f"{first[0]} s" if first else None,
        ", ".join(f"{value} s" for value in small) or None,
        f"{decode['tokens_per_second']:,}" if decode else None,
    )
    yield "| goal | measured | wanted | best published |\n|---|---|---|---|"
    for (what, wanted, published), value in zip(GOALS, values, strict=True):
        yield f"| {what} | {value or 'not measured yet'} | {wanted} | {published} |"
    yield ""


def _layers(found: Mapping[str, Any], shape: str) -> str:
    """Say how much of a model was measured."""
    most = SHAPES[shape].most_layers
    whole = "all" if found["num_layers"] == most and shape == "qwen" else f"{found['num_layers']}"
    return f"{whole} layers, {found['parameters'] / 1e9:.2f} B parameters"


def _speeds(results: Results) -> Iterator[str]:
    yield "## Whole training steps\n"
    yield "| step | layers | parameters | tokens/s | TFLOP/s | of the peak | to BF16 | torch's peak | device in use |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for step in STEPS:
        found = measured(results, step.name)
        if step.work != "speed" or found is None:
            continue
        base = _ratio(results, step.name, f"{step.settings['shape']}_bf16")
        yield (
            f"| `{step.name}`: {step.what} | {found.get('layers', found['contender'])} | "
            f"{found['parameters'] / 1e9:.3g} B | {found['tokens_per_second']:,.0f} | {found['tflops']:,} | "
            f"{_share(results, step.name)} | {base} | {_gigabytes(found.get('peak_bytes'))} | "
            f"{_gigabytes(found.get('device_bytes'))} |"
        )
    yield ""


def _gigabytes(number: int | None) -> str:
    return "–" if number is None else f"{number / 1e9:.1f} GB"


def _correctness(results: Results) -> Iterator[str]:
    found, tests = measured(results, "correctness"), measured(results, "tests")
    if found:
        yield "## Against FP32 on a CPU\n\n| variant | twenty losses, every first gradient |\n|---|---|"
        yield from (f"| {name} | {outcome} |" for name, outcome in found.items())
        yield ""
    if tests:
        yield f"`tests/gpu`, the quick half: {tests['summary']}.\n"
        yield from (f"- {line}" for line in tests["failed"])


def _memory(results: Results) -> Iterator[str]:
    found = {
        step.name: result["memory"]
        for step in STEPS
        if (result := measured(results, step.name)) is not None and "memory" in result
    }
    if not found:
        return
    kinds = list(next(iter(found.values())))
    yield f"## Memory by kind [GB]\n\n| step | {' | '.join(kinds)} |\n|---|{'---|' * len(kinds)}"
    for name, memory in found.items():
        yield f"| `{name}` | {' | '.join(f'{memory[kind] / 1e9:.1f}' for kind in kinds)} |"
    yield ""


def _kernels(results: Results) -> Iterator[str]:
    for step in STEPS:
        kernels = (measured(results, step.name) or {}).get("kernels")
        if not kernels:
            continue
        yield (
            f"## Kernels of one step of `{step.name}`\n\n{kernels['num_kernels']:,} kernels; busy "
            f"{kernels['busy_ms']:,} of {kernels['span_ms']:,} ms.\n\n| part | ms |\n|---|---|"
        )
        yield from (f"| {part} | {milliseconds:,} |" for part, milliseconds in kernels["parts_ms"].items())
        yield "\n| longest kernels | times | ms |\n|---|---|---|"
        yield from (f"| `{name.replace('|', '/')}` | {times} | {ms} |" for name, times, ms in kernels["longest"][:8])
        yield ""


def _waiting(results: Results) -> Iterator[str]:
    commands, decode = measured(results, "start_up"), measured(results, "decode")
    if commands:
        yield "## What a user waits for\n\n| command | seconds |\n|---|---|"
        yield from (f"| {name} | {seconds} |" for name, seconds in commands["seconds"].items())
        yield ""
        if commands["foreign_lines"]:
            yield "Lines of stderr that are not ours:\n"
            yield from (f"    {line}" for line in commands["foreign_lines"])
            yield ""
    if decode:
        yield "| texts at once | first token [s] | tokens/s | without CUDA graphs | the same texts |"
        yield "|---|---|---|---|---|"
        for size in (1, 8):
            row, plain = decode[f"batch_{size}"], decode[f"batch_{size}_without_graphs"]
            first, rate = row["first_token_seconds"], f"{row['tokens_per_second']:,}"
            same = "yes" if plain["same_texts"] else "no"
            yield f"| {size} | {first} | {rate} | {plain['tokens_per_second']:,} | {same} |"
        yield ""


def _left_out(results: Results) -> Iterator[str]:
    rows = []
    for step in STEPS:
        found = results.get(step.name)
        if found is None or found["status"] != "measured":
            rows.append(
                f"| `{step.name}` | {found['status'] if found else 'not tried'} | {(found or {}).get('why', '')} |"
            )
    if rows:
        yield "## Not measured\n\n| step | state | why |\n|---|---|---|"
        yield from rows
