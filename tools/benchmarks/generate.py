#!/usr/bin/env python3
"""Tokens per second of generation with a preset's shape and random weights, on one rank.

    python tools/benchmarks/generate.py tiny_cpu --batch-sizes 1 8 --num-beams 4

On a machine with other work, compare the figures per second of CPU time, which mean something with one thread only.
"""

import argparse
import collections
import itertools
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_7b.config import RunConfig, load_config
from megatron_7b.generation.options import BeamOptions, SamplingOptions


def main() -> None:
    """Measure, and print one JSON object per way of choosing tokens."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8], help="prompts at once")
    parser.add_argument("--num-beams", type=int, default=4, help="of the search, in as many rows per prompt")
    parser.add_argument("--num-prompt-tokens", type=int, default=16)
    parser.add_argument("--num-new-tokens", type=int, default=64)
    parser.add_argument("--vocab-size", type=int, default=32000)
    parser.add_argument("--num-threads", type=int, default=1)
    parser.add_argument("--trials", type=int, default=3, help="the fastest counts")
    flags = parser.parse_args()
    settings = {
        "model.vocab_size": flags.vocab_size,
        "model.transformer_impl": "local",
        "precision.params_dtype": "fp32",
        "runtime.num_threads": flags.num_threads,
        "parallel.tensor_model_parallel_size": 1,
        "parallel.pipeline_model_parallel_size": 1,
    }
    _measure(load_config(flags.preset, settings), flags)


def _measure(config: RunConfig, flags: argparse.Namespace) -> None:
    from megatron_7b.generation.engine import GenerationEngine
    from megatron_7b.generation.requests import GenerationRequest
    from megatron_7b.model.builder import build_model
    from megatron_7b.parallel.groups import initialize_model_parallel, process_groups
    from megatron_7b.runtime.process.distributed import initialize_process, leave_process_group

    device_type = initialize_process(config.runtime)
    layout = initialize_model_parallel(config.parallel, seed=1)
    (model,) = build_model(
        config, vocab_size=flags.vocab_size, layout=layout, groups=process_groups(), device_type=device_type
    )
    ways = {
        "greedy": SamplingOptions(temperature=0.0),
        "sampling": SamplingOptions(top_p=0.9),
        "beams": BeamOptions(num_beams=flags.num_beams),
    }
    for batch_size, (name, decoding) in itertools.product(flags.batch_sizes, ways.items()):
        prompts = [tuple(range(first, first + flags.num_prompt_tokens)) for first in range(batch_size)]
        requests = [
            GenerationRequest(prompt_ids=prompt, max_new_tokens=flags.num_new_tokens, decoding=decoding)
            for prompt in prompts
        ]
        wall = cpu = float("inf")
        for _ in range(flags.trials):
            with GenerationEngine(model, max_batch_size=sum(one.num_rows for one in requests)) as engine:
                started, cpu_started = time.perf_counter(), time.process_time()
                collections.deque(engine.generate(requests), maxlen=0)
                wall = min(wall, time.perf_counter() - started)
                cpu = min(cpu, time.process_time() - cpu_started)
        num_tokens = batch_size * flags.num_new_tokens
        result = {
            "preset": flags.preset,
            "way": name,
            "prompts": batch_size,
            "tokens_per_second": round(num_tokens / wall, 1),
            "tokens_per_cpu_second": round(num_tokens / cpu, 1),
        }
        print(json.dumps(result), flush=True)
    leave_process_group()


if __name__ == "__main__":
    main()
