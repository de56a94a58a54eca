"""What a user waits for: commands from their start, and generated tokens."""

import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpu_steps import Shape

REPOSITORY = Path(__file__).resolve().parents[2]
LARGE = {"--config": "llama2_7b", "--model.num-layers": "8", "--data.seq-length": "4096"}
SMALL = {"--config": "tiny_cpu", "--data.seq-length": "64"}
PREFIX = "corpus_text_document"


def time_commands(folder: Path, *, device: str, is_tiny: bool) -> dict[str, Any]:
    """Time pretrain until its first step, for 2 B parameters, and small commands until their end.

    Returns:
        Seconds by command, and the lines of stderr that are not ours.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    words = ["the", "model", "reads", "a", "text", "and", "learns", "which", "token", "comes", "next"]
    draw = random.Random(1)
    texts = [" ".join(draw.choices(words, k=200)) for _ in range(200)]
    (folder / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    timed: dict[str, Any] = {}
    noise: list[str] = []

    def command(name: str, *arguments: str) -> None:
        started = time.perf_counter()
        done = subprocess.run(_words(*arguments), cwd=folder, env=_environment(), capture_output=True, text=True)
        timed[name] = round(time.perf_counter() - started, 1)
        noise.extend(foreign_lines(done.stderr))
        if done.returncode:
            raise SystemExit(f"{name} failed: {done.stderr.strip().splitlines()[-1:]}")

    command(
        "preprocess", "preprocess", "--input", "corpus.jsonl", "--output-prefix", "corpus", "--tokenizer-model", "bytes"
    )
    small = {**SMALL, "--training.train-steps": "2", "--training.eval-interval-steps": "0", "--run-dir": "small"}
    small |= {"--data.train": PREFIX, "--runtime.device": device, "--telemetry.tensorboard": "False"}
    one = ("--nproc", "1")
    command("pretrain, two steps of 7 M", "pretrain", *_options(small), *one)
    command("evaluate", "evaluate", "--checkpoint", "small", "--data", PREFIX)
    command("convert to-hf", "convert", "to-hf", "--checkpoint", "small", "--output", "small_hf")
    command("generate", "generate", "--checkpoint", "small", "--prompt", "the", "--max-new-tokens", "16")
    large = {**(SMALL if is_tiny else LARGE), "--run-dir": "large", "--data.train": PREFIX, "--runtime.device": device}
    large |= {"--training.micro-batch-size": "1", "--training.global-batch-size": "1"}
    if not is_tiny:
        large |= {"--model.vocab-size": "32000"}
    seconds = _until_first_step(_words("pretrain", *_options(large), *one), folder, folder / "large")
    timed["pretrain until the first step, " + ("7 M" if is_tiny else "1.9 B")] = seconds
    return {"seconds": timed, "foreign_lines": sorted(set(noise))[:20]}


def _words(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "megatron_7b", *arguments]


def _options(given: dict[str, str]) -> list[str]:
    return list(itertools.chain.from_iterable(given.items()))


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}


def foreign_lines(stderr: str) -> list[str]:
    """Return lines that look like warnings of libraries: with a path of a module and a category, or from C++."""
    marks = ("Warning:", "warnings.warn", "[W", "[rank0]:[W")
    return [line.strip()[:200] for line in stderr.splitlines() if any(mark in line for mark in marks)]


def _until_first_step(words: Sequence[str], folder: Path, run: Path) -> float:
    """Start a run, wait for its first step, and end it; returns the seconds that it took."""
    started, log = time.perf_counter(), folder / "first_step.log"
    with log.open("w", encoding="utf-8") as stream:
        process = subprocess.Popen(words, cwd=folder, env=_environment(), stdout=stream, stderr=subprocess.STDOUT)
        try:
            metrics = run / "metrics.jsonl"
            while not (metrics.exists() and metrics.stat().st_size):
                if process.poll() is not None:
                    raise SystemExit(
                        f"pretrain ended early: {log.read_text(encoding='utf-8').strip().splitlines()[-1:]}"
                    )
                time.sleep(0.05)
            return round(time.perf_counter() - started, 1)
        finally:
            process.kill()  # its ranks end with it
            process.wait()


def time_decoding(shape: Shape, device: Any, *, is_tiny: bool) -> dict[str, Any]:
    """Time greedy decoding in BF16 with random weights, for one text and for eight at once."""
    from gpu_training import draw_on_device, peak_memory, synchronize

    from megatron_7b.config import load_config
    from megatron_7b.generation.engine import GenerationEngine
    from megatron_7b.generation.options import SamplingOptions
    from megatron_7b.generation.requests import GenerationRequest
    from megatron_7b.generation.setup import REQUIREMENTS
    from megatron_7b.model.on_ranks import build_on_ranks
    from megatron_7b.model.sizes import count_parameters
    from megatron_7b.runtime.process.distributed import initialize_process

    settings = {**REQUIREMENTS, "precision.params_dtype": "bf16", "runtime.device": device}
    if is_tiny:
        settings |= {"model.vocab_size": 512, "runtime.num_threads": 1}
    config = load_config(shape.preset, settings)
    model = build_on_ranks(config, initialize_process(config.runtime), is_training=False, initialize=False).only_chunk
    draw_on_device([model])
    model.eval()
    prompt_tokens, new_tokens = (8, 8) if is_tiny else (128, 64)
    result: dict[str, Any] = {"parameters": count_parameters(config.model), "prompt_tokens": prompt_tokens}
    for batch_size in (1, 8):
        requests = [
            GenerationRequest(
                prompt_ids=tuple(range(first, first + prompt_tokens)),
                max_new_tokens=new_tokens,
                decoding=SamplingOptions(temperature=0.0),
                ignore_eod=True,
            )
            for first in range(batch_size)
        ]
        of_graphs: list[list[int]] = []
        for cuda_graphs in (True, False):
            for _ in range(2):  # the first one warms up
                texts: list[list[int]] = [[] for _ in requests]
                with GenerationEngine(model, max_batch_size=batch_size, cuda_graphs=cuda_graphs) as engine:
                    synchronize(device)
                    times: list[float] = []
                    started = time.perf_counter()
                    for event in engine.generate(requests):
                        times.append(time.perf_counter() - started)
                        texts[event.request].append(event.token_id)
            of_graphs = of_graphs or texts
            # A graph is captured in the second step, so the second half of the texts is timed.
            seconds = times[-1] - times[batch_size * (new_tokens // 2) - 1]
            result[f"batch_{batch_size}" if cuda_graphs else f"batch_{batch_size}_without_graphs"] = {
                "first_token_seconds": round(times[batch_size - 1], 4),
                "tokens_per_second": round(batch_size * (new_tokens - new_tokens // 2) / seconds, 1),
                "same_texts": texts == of_graphs,
            }
    return result | peak_memory(device)
