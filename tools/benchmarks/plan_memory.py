#!/usr/bin/env python3
"""How far plans of CPU ranks are from what they hold: real runs of a few steps, process and libraries included.

    python tools/benchmarks/plan_memory.py                    # all of them, the table of docs/planning.md
    python tools/benchmarks/plan_memory.py --only GPT-2 TP2   # some

Measured is `memory_bytes` of metrics.jsonl after three steps: what the rank that has held most had at its peak, without
pages of files. Runs are marked `fitted` if the constants of `planning.memory` were chosen by them.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_7b.config import load_config
from megatron_7b.config.schema import RunConfig
from megatron_7b.planning.devices import this_processor
from megatron_7b.planning.planner import Planner
from megatron_7b.training.equivalence.generated import write_generated_corpus

_TP2 = {"parallel.tensor_model_parallel_size": 2}
_SP = {"parallel.sequence_parallel": True}
_PP2 = {"parallel.pipeline_model_parallel_size": 2}
_SHARDED = {"parallel.use_distributed_optimizer": True}
_FULL = {"parallel.recompute_granularity": "full"}
_FP32 = {"precision.params_dtype": "fp32"}
_TWELVE = {"model.num_layers": 12}
_SMOLLM2 = {
    "model.num_layers": 30, "model.hidden_size": 576, "model.ffn_hidden_size": 1536, "model.num_attention_heads": 9,
    "model.num_query_groups": 3, "model.vocab_size": 49_152, "model.share_embeddings_and_output_weights": True,
}  # fmt: skip
_MIXTURE = {
    "model.num_layers": 4, "model.hidden_size": 512, "model.ffn_hidden_size": 688, "model.vocab_size": 8000,
    "data.seq_length": 512, "training.micro_batch_size": 2,
}  # fmt: skip


def _batch(micro: int) -> dict[str, object]:
    return {"training.micro_batch_size": micro}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A run to measure.

    Attributes:
        name: Of the row.
        overrides: What differs from the preset.
        preset: Of the model.
        ranks: How many.
        is_fitted: Constants were chosen by it.
    """

    name: str
    overrides: dict[str, object]
    preset: str = "mini_cpu"
    ranks: int = 1
    is_fitted: bool = False

    def values(self) -> dict[str, object]:
        """Return the run's options: three steps of eight sequences, on one thread."""
        return {
            "training.global_batch_size": 8, "training.train_steps": 3, "training.eval_interval_steps": 0,
            "data.split": "1,0", "telemetry.plot": False, "telemetry.tensorboard": False,
            "checkpoint.save_optimizer": False, "runtime.num_threads": 1, **self.overrides,
        }  # fmt: skip

    def config(self) -> RunConfig:
        """Return the run as a configuration."""
        config = load_config(self.preset, self.values())
        return replace(config, model=replace(config.model, vocab_size=config.model.vocab_size or 259))


CASES = (
    Case(name="tiny_cpu", preset="tiny_cpu", overrides={}, is_fitted=True),
    Case(name="mini_cpu, micro batch 4", overrides={}, is_fitted=True),
    Case(name="micro batch 1", overrides=_batch(1), is_fitted=True),
    Case(name="micro batch 8", overrides=_batch(8), is_fitted=True),
    Case(name="FP32", overrides=_FP32, is_fitted=True),
    Case(name="full recompute", overrides=_FULL, is_fitted=True),
    Case(name="12 layers", overrides=_TWELVE, is_fitted=True),
    Case(name="12 layers, full recompute", overrides={**_TWELVE, **_FULL}, is_fitted=True),
    Case(name="TP2", ranks=2, overrides=_TP2, is_fitted=True),
    Case(name="TP2, sequence parallel", ranks=2, overrides={**_TP2, **_SP}, is_fitted=True),
    Case(name="PP2", ranks=2, overrides=_PP2, is_fitted=True),
    Case(name="PP2 × VPP3", ranks=2, is_fitted=True, overrides={
        **_PP2, **_batch(2), "parallel.virtual_pipeline_model_parallel_size": 3,
    }),
    Case(name="DP2", ranks=2, overrides={}),
    Case(name="DP2, distributed optimizer", ranks=2, overrides=_SHARDED, is_fitted=True),
    Case(name="DP2, distributed optimizer, FP32", ranks=2, overrides={**_SHARDED, **_FP32}, is_fitted=True),
    Case(name="CP2", ranks=2, overrides={"parallel.context_parallel_size": 2}, is_fitted=True),
    Case(name="TP2 × PP2, sequence parallel", ranks=4, is_fitted=True,
         overrides={**_TP2, **_SP, **_PP2, **_batch(2)}),
    Case(name="1,024 wide", is_fitted=True, overrides={
        "model.hidden_size": 1024, "model.ffn_hidden_size": 2816, **_batch(2),
    }),
    Case(name="GPT-2", preset="gpt2", overrides={**_batch(2), "model.attention_dropout": 0.0}, is_fitted=True),
    Case(name="SmolLM2-135M's shape", overrides={**_SMOLLM2, **_batch(2)}, is_fitted=True),
    Case(name="SmolLM2-135M's shape, TP3", ranks=3, is_fitted=True, overrides={
        **_SMOLLM2, **_batch(2), **_SP, "parallel.tensor_model_parallel_size": 3, "data.seq_length": 510,
    }),
    Case(name="SmolLM2-135M's shape, DP2, distributed optimizer", ranks=2, is_fitted=True, overrides={
        **_SMOLLM2, **_batch(2), **_SHARDED,
    }),
    Case(name="moe_tiny_cpu, 6 layers, BF16", preset="moe_tiny_cpu", overrides={
        "model.num_layers": 6, "model.vocab_size": 4000, "precision.params_dtype": "bf16", **_batch(4),
    }),
    Case(name="a mixture of 8 experts, FP32", preset="moe_tiny_cpu", overrides={**_MIXTURE, **_FP32}),
    Case(name="the same, EP2, distributed optimizer", preset="moe_tiny_cpu", ranks=2, is_fitted=True, overrides={
        **_MIXTURE, **_FP32, **_SHARDED, "parallel.expert_model_parallel_size": 2,
    }),
    # Chosen after the constants were.
    Case(name="768 wide, 8 layers", overrides={
        "model.hidden_size": 768, "model.ffn_hidden_size": 2048, "model.num_layers": 8, **_batch(2),
    }),
    Case(name="16,000 tokens, sequences of 1,024", overrides={
        "model.vocab_size": 16_000, "data.seq_length": 1024, **_batch(2),
    }),
    Case(name="PP3", ranks=3, overrides={"parallel.pipeline_model_parallel_size": 3, **_batch(2)}),
    Case(name="TP2 × DP2, distributed optimizer", ranks=4, overrides={**_TP2, **_SHARDED, **_batch(2)}),
)  # fmt: skip


def measure(case: Case, folder: Path) -> int:
    """Return the most that a rank of the run held."""
    corpus = write_generated_corpus(folder / "data", case.config())
    words = ["--config", case.preset, "--run-dir", str(folder / "run"), "--nproc", str(case.ranks)]
    for path, value in {**case.values(), **corpus}.items():
        words += [f"--{path.replace('_', '-')}", *map(str, value if isinstance(value, list) else [value])]
    subprocess.run([sys.executable, "-m", "megatron_7b", "pretrain", *words], check=True, capture_output=True)
    *_, last = (json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines())
    return int(last["memory_bytes"])


def predicted(case: Case) -> int:
    """Return what a plan says of it."""
    device = this_processor(case.ranks, memory=64 << 30)
    return Planner(case.config(), device).look_at(case.config(), case.ranks).memory.total


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], help="names of runs")
    only = parser.parse_args().only
    print("| run | ranks | measured | predicted | error | used |\n|---|---|---|---|---|---|")
    for case in CASES:
        if only and case.name not in only:
            continue
        with tempfile.TemporaryDirectory() as folder:
            held = measure(case, Path(folder))
        said = predicted(case)
        used = "fitted" if case.is_fitted else "held out"
        print(
            f"| {case.name} | {case.ranks} | {held / 1e6:,.0f} MB | {said / 1e6:,.0f} MB | "
            f"{100 * (said / held - 1):+.1f} % | {used} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
