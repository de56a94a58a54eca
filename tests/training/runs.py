"""Tiny runs of the real loop on real ranks: a corpus, a configuration, and what a rank does with them."""

import dataclasses
import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from megatron_7b.config.optimizer_config import OptimizerConfig
from megatron_7b.config.schema import (
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    PrecisionConfig,
    RunConfig,
    RuntimeConfig,
    TelemetryConfig,
    TrainingConfig,
)

VOCAB_SIZE = 97
SEQ_LENGTH = 16
NUM_DOCUMENTS = 60


def write_corpus(folder: Path, *, bad_id: int | None = None, seed: int = 5, num_documents: int = NUM_DOCUMENTS) -> str:
    """Write documents of a noisy ramp, which are quickly learnt, and return the prefix; `bad_id` is in the middle."""
    from megatron_7b.data import IndexWriter

    prefix = str(folder / "corpus_text_document")
    random = np.random.default_rng(seed)
    writer = IndexWriter(prefix, 2)
    for number in range(num_documents):
        ids = (random.integers(VOCAB_SIZE) + 3 * np.arange(50) + random.integers(0, 2, 50)) % VOCAB_SIZE
        if bad_id is not None and number == num_documents // 2:
            ids[25] = bad_id
        writer.add_document(ids.astype(np.uint16))
    writer.finish()
    return prefix


def config(corpus: str, **sections: dict[str, Any]) -> RunConfig:
    """A two-layer FP32 run of 6 steps, each of 2 microbatches on 2 ranks; `sections` overrides fields."""
    run = RunConfig(
        model=ModelConfig(
            num_layers=2,
            hidden_size=32,
            ffn_hidden_size=64,
            num_attention_heads=2,
            vocab_size=VOCAB_SIZE,
            make_vocab_size_divisible_by=8,
            max_position_embeddings=SEQ_LENGTH,
            transformer_impl="local",
        ),
        precision=PrecisionConfig(params_dtype="fp32"),
        optimizer=OptimizerConfig(lr=1e-2, min_lr=1e-3, lr_warmup_steps=2),
        data=DataConfig(train=(corpus,), split="80,20,0", seq_length=SEQ_LENGTH),
        training=TrainingConfig(
            train_steps=6, micro_batch_size=2, global_batch_size=8, eval_interval_steps=3, eval_steps=2, seed=7
        ),
        checkpoint=CheckpointConfig(save_interval_steps=3),
        telemetry=TelemetryConfig(tensorboard=False, plot=False),
        runtime=RuntimeConfig(num_threads=1),  # ranks share the cores with those of other tests
    )
    return dataclasses.replace(
        run, **{name: dataclasses.replace(getattr(run, name), **fields) for name, fields in sections.items()}
    )


def pretrain(run: RunConfig, run_dir: Path) -> tuple[int | None, str]:
    """Entry point of a rank: (exit code, "") or (None, what it raised)."""
    import torch.distributed as dist

    from megatron_7b import training
    from megatron_7b.errors import MegatronError

    os.environ["RANK"] = str(dist.get_rank())
    try:
        return training.pretrain(run, run_dir), ""
    except MegatronError as error:
        return None, f"{type(error).__name__}: {error}"


def pretrain_with_signal(run: RunConfig, run_dir: Path, rank: int, number: int, step: int) -> tuple[int | None, str]:
    """As `pretrain`, but one rank gets a signal once metrics.jsonl has a step."""
    import torch.distributed as dist

    def strike() -> None:
        while not any(line.get("step") == step for line in metrics(run_dir)):
            time.sleep(0.002)
        os.kill(os.getpid(), signal.Signals(number))

    if dist.get_rank() == rank:
        threading.Thread(target=strike, daemon=True).start()
    return pretrain(run, run_dir)


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The complete lines of metrics.jsonl, parsed strictly."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in lines if line.endswith("\n")]


def steps(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of steps."""
    return [line for line in metrics(run_dir) if "loss" in line]


def validations(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of validations."""
    return [line for line in metrics(run_dir) if "validation_loss" in line]


def status(run_dir: Path) -> dict[str, Any]:
    """status.json."""
    return dict(json.loads((run_dir / "status.json").read_text()))
