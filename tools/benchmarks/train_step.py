#!/usr/bin/env python3
"""Training speed on a CPU against Hugging Face: the same model, batch and optimizer, side by side in one run.

    python tools/benchmarks/train_step.py                 # prints the table
    python tools/benchmarks/train_step.py --write docs/benchmarks/train_step.md

`mini_cpu` (52 M parameters) against LlamaForCausalLM of the same shape with torch's AdamW, under BF16 autocast, which
is how one would train it with transformers on a CPU. Each contender runs in a process of its own, in turn, several
times; what counts is the median, and the ratio of neighbours. The machine's own matrix-product rates are measured in
the same run: they say what a step could take at best.

Contenders in BF16 are left out on a processor that only emulates it, where one of their steps takes minutes; --emulated
or --only asks for them all the same.
"""

import argparse
import datetime as dt
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
PRESET = "mini_cpu"
OVERRIDES = {"training.global_batch_size": 8}  # two microbatches: enough to show what accumulating them costs
CONTENDERS = {
    "megatron_7b, auto": ("ours", "auto"),
    "megatron_7b, fp32": ("ours", "fp32"),
    "megatron_7b, bf16": ("ours", "bf16"),
    "transformers, bf16 autocast": ("transformers", "bf16"),
    "transformers, fp32": ("transformers", "fp32"),
}
BASELINES = ("transformers, bf16 autocast", "transformers, fp32")
"""The first of these that runs is what the others are compared with."""


def say(message: str) -> None:
    """Print progress to stderr at once; the table is what stdout is for."""
    print(message, file=sys.stderr, flush=True)


def choose_contenders(asked_for: list[str] | None, *, native_bf16: bool, emulated: bool) -> list[str]:
    """Return who runs: those asked for, else all but those that the processor emulates."""
    if asked_for is not None:
        return asked_for
    left_out = [] if native_bf16 or emulated else [name for name, (_, dtype) in CONTENDERS.items() if dtype == "bf16"]
    if left_out:
        say(f"left out, because this processor emulates BF16 (--emulated runs them): {'; '.join(left_out)}")
    return [name for name in CONTENDERS if name not in left_out]


def has_native_bf16() -> bool:
    """Return whether the processor multiplies BF16 itself."""
    from megatron_7b.runtime.machine import device

    return device.has_native_bf16("cpu")


def matrix_product_rates(formats: list[str]) -> dict[str, float]:
    """Return GFLOP/s of a large square matrix product by number format, with all threads."""
    import torch

    rates = {}
    for name in formats:
        say(f"measuring the matrix product in {name.upper()}")
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[name]
        a, b = torch.randn(2048, 2048, dtype=dtype), torch.randn(2048, 2048, dtype=dtype)
        a @ b
        seconds = []
        for _ in range(5):
            start = time.perf_counter()
            a @ b
            seconds.append(time.perf_counter() - start)
        rates[name] = 2 * 2048**3 / min(seconds) / 1e9
    return rates


def random_tokens(shape: tuple[int, int], vocab_size: int, seed: int) -> Any:
    """Return token ids of a shape, the same for the same seed."""
    import numpy as np

    return np.random.default_rng(seed).integers(0, vocab_size, size=shape)


def prepare_ours(dtype: str) -> tuple[Callable[[int], float], int]:
    """Return a function that does one step and gives the loss, and the tokens of a step."""
    import numpy as np

    from megatron_7b.config import load_config
    from megatron_7b.data import Batch
    from megatron_7b.runtime.process.distributed import initialize_process
    from megatron_7b.training.learner import build_learner
    from megatron_7b.training.step import train_step

    config = load_config(PRESET, {**OVERRIDES, "precision.params_dtype": dtype})
    core = build_learner(config, initialize_process(config.runtime))
    size, s = config.training.micro_batch_size, config.data.seq_length
    num_microbatches = config.training.global_batch_size // size
    assert config.model.vocab_size is not None
    positions = np.broadcast_to(np.arange(s), (size, s)).copy()

    def step(number: int) -> float:
        batches = []
        for index in range(num_microbatches):
            ids = random_tokens((size, s + 1), config.model.vocab_size or 0, number * 100 + index)
            mask = np.ones((size, s), dtype=np.float32)
            batches.append(Batch(ids[:, :-1].copy(), ids[:, 1:].copy(), mask, positions))
        return train_step(core, batches, config.optimizer.lr).loss

    return step, config.training.global_batch_size * s


def prepare_transformers(dtype: str) -> tuple[Callable[[int], float], int]:
    """The same with LlamaForCausalLM, gradient accumulation, clipping and torch's AdamW."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from megatron_7b.config import load_config

    config = load_config(PRESET, OVERRIDES)
    model = config.model
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=model.vocab_size,
            hidden_size=model.hidden_size,
            intermediate_size=model.ffn_hidden_size,
            num_hidden_layers=model.num_layers,
            num_attention_heads=model.num_attention_heads,
            num_key_value_heads=model.num_query_groups or model.num_attention_heads,
            max_position_embeddings=model.max_position_embeddings,
            tie_word_embeddings=model.share_embeddings_and_output_weights,
            use_cache=False,
        )
    )
    settings = config.optimizer
    adam = torch.optim.AdamW(
        llama.parameters(),
        lr=settings.lr,
        betas=(settings.adam_beta1, settings.adam_beta2),
        eps=settings.adam_eps,
        weight_decay=settings.weight_decay,
    )
    size, s = config.training.micro_batch_size, config.data.seq_length
    num_microbatches = config.training.global_batch_size // size

    def step(number: int) -> float:
        adam.zero_grad()
        total = 0.0
        for index in range(num_microbatches):
            ids = torch.from_numpy(random_tokens((size, s), model.vocab_size or 0, number * 100 + index))
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bf16"):
                loss = llama(input_ids=ids, labels=ids).loss / num_microbatches
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(llama.parameters(), settings.clip_grad)
        adam.step()
        return total

    return step, config.training.global_batch_size * s


def run_worker(kind: str, dtype: str, steps: int) -> dict[str, float]:
    """Time `steps` steps in this process, after one that is not counted."""
    import resource

    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    step, tokens = prepare_ours(dtype) if kind == "ours" else prepare_transformers(dtype)
    step(0)
    seconds = []
    for number in range(1, steps + 1):
        start = time.perf_counter()
        loss = step(number)
        seconds.append(time.perf_counter() - start)
    return {
        "tokens_per_second": tokens / statistics.median(seconds),
        "loss": loss,
        "peak_memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
    }


def start_worker(kind: str, dtype: str, steps: int) -> dict[str, float]:
    """Run `run_worker` in a process of its own."""
    result = subprocess.run(
        [sys.executable, __file__, "--worker", kind, dtype, "--steps", str(steps)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )
    if result.returncode:
        raise SystemExit(f"{kind} {dtype} failed:\n{result.stderr[-3000:]}")
    values: dict[str, float] = json.loads(result.stdout.strip().splitlines()[-1])
    return values


def compare(contenders: list[str], repeats: int, steps: int, *, uses_bf16: bool) -> str:
    """Run all contenders in turn and return a Markdown table; `uses_bf16` measures that matrix product as well."""
    from megatron_7b.config import load_config
    from megatron_7b.model.sizes import count_parameters, flops_per_token

    config = load_config(PRESET, OVERRIDES)
    flops = flops_per_token(config.model, config.data.seq_length)
    rates = matrix_product_rates(sorted({"fp32", *(["bf16"] if uses_bf16 else [])}, reverse=True))
    baseline = next((name for name in BASELINES if name in contenders), None)
    started, total = time.monotonic(), repeats * len(contenders)
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name in contenders:
            number = sum(map(len, runs.values()))
            left = (time.monotonic() - started) / number * (total - number) if number else None
            say(f"run {number + 1} of {total}: {name}" + (f" (about {left / 60:.1f} minutes left)" if left else ""))
            runs[name].append(start_worker(*CONTENDERS[name], steps))
            say(f"  {runs[name][-1]['tokens_per_second']:.0f} tokens/s")
    training = config.training
    measured = ", ".join(f"{rate:.0f} GFLOP/s in {name.upper()}" for name, rate in rates.items())
    machine = (
        f"Machine: {cpu_name()}, {len(os.sched_getaffinity(0))} cores, {platform.system()}; "
        f"matrix product 2048³: {measured}."
    )
    model = (
        f"Model: `{PRESET}`, {count_parameters(config.model) / 1e6:.1f} M parameters, {flops / 1e6:.0f} MFLOP/token "
        f"(causal), {training.global_batch_size} sequences of {config.data.seq_length} per step in microbatches "
        f"of {training.micro_batch_size}. Median of {repeats} processes, {steps} steps each."
    )
    formats = " / ".join(map(str.upper, rates))
    versus = baseline or "the baseline"
    header = f"| contender | tokens/s | GFLOP/s | of the {formats} rate | ratio to {versus} (min–max) | GB |"
    lines = [machine, "", model, "", header, "|---|---|---|---|---|---|"]
    for name in contenders:
        speeds = [run["tokens_per_second"] for run in runs[name]]
        speed = statistics.median(speeds)
        gflops = speed * flops / 1e9
        shares = " / ".join(f"{gflops / rate:.0%}" for rate in rates.values())
        ratio = "–"
        if baseline is not None:
            pairs = [a / b["tokens_per_second"] for a, b in zip(speeds, runs[baseline], strict=True)]
            ratio = f"{statistics.median(pairs):.2f} ({min(pairs):.2f}–{max(pairs):.2f})"
        memory = statistics.median(run["peak_memory_gb"] for run in runs[name])
        lines.append(f"| {name} | {speed:.0f} | {gflops:.0f} | {shares} | {ratio} | {memory:.2f} |")
    return "\n".join(lines) + "\n"


def cpu_name() -> str:
    """Return the processor's name."""
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def main() -> None:
    """Parse the command line and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="processes per contender (default 3)")
    parser.add_argument("--steps", type=int, default=4, help="timed steps per process (default 4)")
    parser.add_argument("--only", nargs="+", choices=list(CONTENDERS), help="contenders")
    parser.add_argument("--emulated", action="store_true", help="also what this processor only emulates")
    parser.add_argument("--write", type=Path, help="also write the dated table to this file")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(run_worker(*arguments.worker, arguments.steps)))
        return
    say("loading torch")
    native_bf16 = has_native_bf16()
    contenders = choose_contenders(arguments.only, native_bf16=native_bf16, emulated=arguments.emulated)
    uses_bf16 = native_bf16 or any(CONTENDERS[name][1] == "bf16" for name in contenders)
    table = compare(contenders, arguments.repeats, arguments.steps, uses_bf16=uses_bf16)
    print("\n" + table)
    if arguments.write:
        arguments.write.parent.mkdir(parents=True, exist_ok=True)
        command = "python tools/benchmarks/train_step.py"
        heading = f"# Training step on a CPU\n\n{dt.datetime.now(tz=dt.UTC).date()}, `{command}`\n\n"
        arguments.write.write_text(heading + table, encoding="utf-8")


if __name__ == "__main__":
    sys.path.insert(0, str(REPOSITORY))
    main()
