"""Logits of a checkpoint, computed by this process alone with the model that training uses."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_7b.adapter.low_rank.merging import merge_updates
from megatron_7b.checkpoint.inference_config import inference_config
from megatron_7b.checkpoint.manifest import read_config
from megatron_7b.checkpoint.open_model import opened_model
from megatron_7b.config.schema import ModelConfig
from megatron_7b.conversion.parity import answer_to, round_parameters
from megatron_7b.data import Batch
from megatron_7b.data.samples.dataset import RecordsOfBatch
from megatron_7b.model.on_ranks import ModelOnRanks
from megatron_7b.objective import build_objective
from megatron_7b.runtime.cpu import backend as cpu_backend


def checkpoint_logits(
    folder: Path,
    tokens: Tensor,
    *,
    round_to: torch.dtype | None = None,
    arithmetic: torch.dtype = torch.float32,
    of_pairs: bool = False,
    merged: bool = False,
) -> Tensor:
    """Load a checkpoint of any layout into a model on one rank, and compute the logits of whole sequences.

    Args:
        folder: A complete checkpoint, its hashes already checked; it is read as training reads it, not as an export
            does, so that a fault in either shows.
        tokens: int64 `[b, s]`.
        round_to: Number format that weights are rounded to beforehand; None leaves them as they are.
        arithmetic: Number format to compute in; FP64 takes twice the memory, and shows what rounding hides.
        of_pairs: The logits of the two classes of pairs of sentences instead of those of tokens.
        merged: Merge an adapter into its model, before anything is rounded.

    Returns:
        FP32 `[b, s, v]` on the CPU, vocabulary padding included; of pairs `[b, 1, 2]`; of an encoder-decoder,
        those of `answer_to(tokens)`; of a head its outputs `[b, n, labels]`.

    Raises:
        CheckpointError: The checkpoint does not fit its own configuration.
    """
    settings = {
        "model.transformer_impl": "local",  # computes in any number format, and needs no GPU
        "precision.params_dtype": "bf16" if arithmetic == torch.bfloat16 else "fp32",
        "precision.fp8": "none",
        "data.seq_length": tokens.shape[1],
        "checkpoint.verify_on_load": False,
    }
    if read_config(folder).adapter.method == "qlora":
        settings["adapter.method"] = "lora"  # beside the model in full: that is what others have
    config = inference_config(folder, settings)
    with cpu_backend.installed_if_needed(), opened_model(folder, config, fp32_on_cpu=False) as model:
        if merged:
            merge_updates(model.only_chunk)
        if round_to is not None:
            round_parameters(model.only_chunk, round_to)
        model.only_chunk.to(arithmetic)
        with torch.inference_mode():
            # One sample at a time: [s, v] in FP32 is what a large vocabulary makes expensive.
            one = {"pair_labels": torch.zeros(1, dtype=torch.int64)} if of_pairs else {}
            outputs = (model.only_chunk(**text_inputs(sample, model), **one) for sample in tokens)
            logits = [_logits(output, model, of_pairs=of_pairs).float().cpu() for output in outputs]
    return torch.stack(logits)


def _logits(output: Any, model: ModelOnRanks, *, of_pairs: bool) -> Tensor:
    """Return the logits of the only sample, [s, v]; those of a head are all outputs, as it makes them."""
    logits: Tensor = output if model.config.model.has_head else output[1] if of_pairs else output[0]
    return logits


def _one_record(model: ModelConfig, length: int) -> RecordsOfBatch:
    """Return a text of which everything that the head can classify is asked for."""
    values = np.zeros((1, max(model.num_labels, 2)), np.float32)
    tokens = np.full((1, length), float(model.head == "token_classification"), np.float32)
    return RecordsOfBatch(
        begins=np.zeros(1, np.int64),
        lengths=np.full(1, length),
        record=np.zeros(1, np.int64),
        numbers=np.zeros(1, np.int64),
        values=values,
        token_values=tokens,
    )


def text_inputs(sample: Tensor, model: ModelOnRanks) -> dict[str, Any]:
    """Return what the model takes of one sample [s] that is a text by itself."""
    kind = model.config.model.traits.kind
    tokens = sample[None].numpy()
    length = tokens.shape[1]
    answer = answer_to(sample)[None].numpy() if kind == "encoder_decoder" else None
    labels = tokens if answer is None else answer
    batch = Batch(
        tokens,
        labels=labels,
        loss_mask=np.ones(labels.shape, np.float32),
        position_ids=np.arange(length)[None],
        cu_seqlens=np.array([0, length], np.int32) if kind == "encoder" else None,  # which is told where texts begin
        decoder_tokens=answer,
        records=_one_record(model.config.model, length) if model.config.model.has_head else None,
    )
    inputs = build_objective(model.config).model_inputs(batch, model.device, model.layout)
    return {name: value for name, value in inputs.items() if name not in ("labels", "loss_mask")}
