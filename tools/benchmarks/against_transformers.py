#!/usr/bin/env python3
"""Generation and corpus loss beside transformers: one folder, one batch, in turn, on a CPU.

    python tools/benchmarks/against_transformers.py --hf FOLDER --checkpoint C --dtype bf16

C is what `convert from-hf` made of the folder. Prompts have different lengths; transformers reads them filled up on the
left. Both continue greedily and do not stop; both compute the losses of the same random windows in the same batches.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_7b.checkpoint import resolve_checkpoint  # after the path is set, without an install
from megatron_7b.checkpoint.inference_config import inference_config
from megatron_7b.checkpoint.open_model import opened_model
from megatron_7b.generation.engine import GenerationEngine
from megatron_7b.generation.options import SamplingOptions
from megatron_7b.generation.requests import GenerationRequest

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def main() -> None:
    """Measure, and print a table and one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hf", type=Path, required=True, help="the Hugging Face folder")
    parser.add_argument("--checkpoint", type=Path, required=True, help="the same as a checkpoint")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--num-prompts", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--num-new-tokens", type=int, default=64)
    parser.add_argument("--windows", type=int, nargs=3, default=[8, 4, 256], help="number, batch and tokens of windows")
    parser.add_argument("--num-threads", type=int, default=2)
    parser.add_argument("--trials", type=int, default=3, help="in turn; medians count")
    flags = parser.parse_args()
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(flags.num_threads)
    theirs = AutoModelForCausalLM.from_pretrained(flags.hf, dtype=DTYPES[flags.dtype]).eval()
    overrides = {"precision.params_dtype": flags.dtype, "runtime.num_threads": flags.num_threads}
    rows: dict[str, dict[str, Any]] = {}
    folder = resolve_checkpoint(flags.checkpoint)
    with opened_model(folder, inference_config(folder, overrides), fp32_on_cpu=False) as opened:
        chunk = opened.only_chunk
        with GenerationEngine(chunk) as engine:
            for number in flags.num_prompts:
                prompts = _prompts(number, theirs.config.vocab_size)
                rows[f"generation, {number} prompts"] = _in_turn(
                    lambda prompts=prompts: _continue(engine, prompts, flags.num_new_tokens),
                    lambda prompts=prompts: _their_texts(theirs, prompts, flags.num_new_tokens),
                    number * flags.num_new_tokens,
                    flags.trials,
                )
        number, batch, length = flags.windows
        windows = torch.randint(0, theirs.config.vocab_size, (number, length + 1), generator=torch.manual_seed(1))
        rows[f"loss of {number} windows of {length}"] = _in_turn(
            lambda: _our_loss(chunk, windows, batch),
            lambda: _their_loss(theirs, windows, batch),
            number * length,
            flags.trials,
        )
    for name, row in rows.items():
        print(
            f"{name:32} ours {row['ours']:9.1f} tokens/s   transformers {row['transformers']:9.1f}   "
            f"ratio {row['ratio']:.2f}   same: {row['same']}"
        )
    print(json.dumps({"dtype": flags.dtype, **rows}))


def _in_turn(ours: Callable[[], Any], theirs: Callable[[], Any], num_tokens: int, trials: int) -> dict[str, Any]:
    """Time two ways of doing the same in turn, after one round that does not count."""
    seconds: tuple[list[float], list[float]] = ([], [])
    results: list[Any] = []
    for trial in range(trials + 1):
        results = []
        for way, taken in zip((ours, theirs), seconds, strict=True):
            started = time.perf_counter()
            results.append(way())
            if trial:
                taken.append(time.perf_counter() - started)
    mine, other = map(statistics.median, seconds)
    same = abs(results[0] - results[1]) if isinstance(results[0], float) else results[0] == results[1]
    return {"ours": num_tokens / mine, "transformers": num_tokens / other, "ratio": other / mine, "same": same}


def _prompts(number: int, vocab_size: int) -> list[tuple[int, ...]]:
    generator = torch.manual_seed(7)
    return [
        tuple(torch.randint(0, vocab_size, (20 + 7 * index,), generator=generator).tolist()) for index in range(number)
    ]


def _continue(engine: GenerationEngine, prompts: list[tuple[int, ...]], num_tokens: int) -> list[list[int]]:
    greedy = SamplingOptions(temperature=0.0)
    texts: list[list[int]] = [[] for _ in prompts]
    requests = [GenerationRequest(prompt_ids=ids, max_new_tokens=num_tokens, decoding=greedy) for ids in prompts]
    for event in engine.generate(requests):
        texts[event.request].append(event.token_id)
    return texts


@torch.inference_mode()
def _their_texts(model: Any, prompts: list[tuple[int, ...]], num_tokens: int) -> list[list[int]]:
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    texts = model.generate(
        ids, attention_mask=mask, max_new_tokens=num_tokens, min_new_tokens=num_tokens, do_sample=False,
        pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    answer: list[list[int]] = texts[:, longest:].tolist()
    return answer


@torch.inference_mode()
def _our_loss(model: Any, windows: torch.Tensor, batch: int) -> float:
    total = 0.0
    for rows in windows.split(batch):
        positions = torch.arange(rows.shape[1] - 1).expand(len(rows), -1)
        mask = torch.ones(len(rows), rows.shape[1] - 1)
        total += float(model(rows[:, :-1], positions, labels=rows[:, 1:], loss_mask=mask))
    return total / (windows.numel() - len(windows))


@torch.inference_mode()
def _their_loss(model: Any, windows: torch.Tensor, batch: int) -> float:
    losses = [float(model(input_ids=rows, labels=rows).loss) * len(rows) for rows in windows.split(batch)]
    return sum(losses) / len(windows)


if __name__ == "__main__":
    main()
