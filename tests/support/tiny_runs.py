"""Tiny runs on real ranks: what the equivalence, checkpoint and resume tests share."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch.distributed as dist

from megatron_7b.config.optimizer_config import OptimizerConfig
from megatron_7b.config.schema import (
    DataConfig,
    ModelConfig,
    ParallelConfig,
    PrecisionConfig,
    RunConfig,
    TrainingConfig,
)

VOCAB_SIZE = 509  # not a multiple of anything, so that every layout pads
SEQ_LENGTH = 32


@dataclasses.dataclass
class ArrayBatch:
    """A microbatch: arrays [b, s], and where its documents begin."""

    tokens: np.ndarray
    labels: np.ndarray
    loss_mask: np.ndarray
    position_ids: np.ndarray
    cu_seqlens: np.ndarray | None = None
    tokentype_ids: np.ndarray | None = None
    decoder_tokens: np.ndarray | None = None
    attention_mask: np.ndarray | None = None
    is_word_before: np.ndarray | None = None
    pair_labels: np.ndarray | None = None
    top_logits: Any = None


def tiny_config(**sections: dict[str, Any]) -> RunConfig:
    """Return a four-layer FP32 model with grouped queries; `sections` overrides fields, e.g. `parallel={...}`."""
    config = RunConfig(
        model=ModelConfig(
            num_layers=4,
            hidden_size=64,
            ffn_hidden_size=96,
            num_attention_heads=4,
            num_query_groups=2,
            vocab_size=VOCAB_SIZE,
            make_vocab_size_divisible_by=8,
            transformer_impl="local",
        ),
        parallel=ParallelConfig(),
        precision=PrecisionConfig(params_dtype="fp32"),
        optimizer=OptimizerConfig(lr=1e-2),
        data=DataConfig(seq_length=SEQ_LENGTH),
        training=TrainingConfig(micro_batch_size=2, global_batch_size=8, seed=7),
    )
    return dataclasses.replace(
        config, **{name: dataclasses.replace(getattr(config, name), **fields) for name, fields in sections.items()}
    )


def batches(config: RunConfig, step: int, *, dp_rank: int, dp_size: int, masked: bool = True) -> list[ArrayBatch]:
    """Return one data-parallel rank's microbatches of a step: the same global batch at every layout.

    The text is a noisy ramp over 61 tokens, which can be learnt within ten steps; they are spread over the vocabulary,
    so that every tensor rank holds some. A fifth of the loss mask is zero: the mean per token is not that of the means.
    """
    training, s = config.training, config.data.seq_length
    random = np.random.default_rng(1000 + step)
    starts = random.integers(0, VOCAB_SIZE, size=(training.global_batch_size, 1))
    noise = random.integers(0, 3, size=(training.global_batch_size, s + 1))
    ids = (starts + np.arange(s + 1) * 5 + noise) % 61 * 8  # few distinct tokens, over the whole vocabulary
    mask = np.ones((training.global_batch_size, s), dtype=np.float32)
    if masked:
        mask[random.random(mask.shape) < 0.2] = 0.0
    size = training.micro_batch_size
    rows = [
        slice(first + dp_rank * size, first + (dp_rank + 1) * size)
        for first in range(0, training.global_batch_size, size * dp_size)
    ]
    positions = np.broadcast_to(np.arange(s), (size, s)).copy()
    begins = np.zeros((training.global_batch_size, s), dtype=bool)
    if config.data.reset_attention_mask:
        begins = random.random(begins.shape) < 0.15
        begins[:, 0] = True
    if config.model.traits.kind == "encoder":
        begins[:, 0] = True  # every sample is a text of its own
    if config.model.traits.kind == "encoder_decoder":
        return [_text_with_answers(ids[r], mask[r], positions) for r in rows]
    if config.objective.sentence_pairs != "none":
        return [_pairs(ids[r], mask[r], positions) for r in rows]
    return [
        ArrayBatch(ids[r, :-1].copy(), ids[r, 1:].copy(), mask[r].copy(), positions, cumulative_lengths(begins[r]))
        for r in rows
    ]


def _pairs(ids: np.ndarray, mask: np.ndarray, positions: np.ndarray) -> ArrayBatch:
    """Return padded rows whose class is that of their first token, which tells it; ids are [b, s + 1]."""
    rows, width = mask.shape
    lengths = width - 3 * (np.arange(rows) % 3)
    begins = np.zeros((rows, width), dtype=bool)
    begins[:, 0] = True
    for row, length in enumerate(lengths):
        begins[row, length:] = np.arange(length, width) == length
    mask = np.where(np.arange(width) < lengths[:, None], mask, 0).astype(np.float32)
    types = np.broadcast_to(np.arange(width) >= width // 2, mask.shape).astype(np.int64)
    return ArrayBatch(
        ids[:, :-1].copy(), ids[:, 1:].copy(), mask, positions, cumulative_lengths(begins), tokentype_ids=types,
        pair_labels=(ids[:, 0] > 30 * 8).astype(np.int64),
    )  # fmt: skip


def _text_with_answers(ids: np.ndarray, mask: np.ndarray, positions: np.ndarray) -> ArrayBatch:
    """Let the first half of the tokens, an odd number, be the answer to all of them; text ends early in every row."""
    labels = ids[:, 1 : ids.shape[1] // 2].copy()
    decoder = np.roll(labels, 1, axis=1)
    decoder[:, 0] = 0
    ends = ids.shape[1] - 2 - np.arange(len(ids))[:, None] * 3
    return ArrayBatch(
        ids[:, :-1].copy(),
        labels,
        mask[:, : labels.shape[1]].copy(),
        positions,
        decoder_tokens=decoder,
        attention_mask=np.arange(ids.shape[1] - 1) < ends,
    )


def cumulative_lengths(begins: np.ndarray) -> np.ndarray | None:
    """Return cu_seqlens of rows [b, s] from where documents begin; None where none does."""
    if not begins.any():
        return None
    return np.append(np.flatnonzero(begins.ravel()), begins.size).astype(np.int32)


def run_steps(trainer: Any, steps: Iterator[int] | range, *, masked: bool = True) -> list[tuple[float, float]]:
    """Train on `steps` and return (loss, gradient norm) of each."""
    from megatron_7b.training.step import train_step

    layout, results = trainer.layout, []
    for step in steps:
        rows = batches(trainer.config, step, dp_rank=layout.dp_rank, dp_size=layout.dp_size, masked=masked)
        result = train_step(trainer, rows, trainer.config.optimizer.lr)
        results.append((result.loss, result.grad_norm))
    return results


def build(config: RunConfig) -> Any:
    """Build a trainer on the current process group."""
    from megatron_7b.training.learner import build_learner

    assert dist.is_initialized()
    return build_learner(config, "cpu")


def train(config: RunConfig, num_steps: int) -> list[tuple[float, float]]:
    """Entry point of a rank: train a fresh model and return (loss, gradient norm) of each step."""
    return run_steps(build(config), range(num_steps))
