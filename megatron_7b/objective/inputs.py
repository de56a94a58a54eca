"""What models take of a microbatch: its arrays on the device, and where its documents begin, or what is padding."""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from numpy.typing import NDArray

from megatron_7b.model.context_parallel import share_of
from megatron_7b.parallel import ParallelLayout

if TYPE_CHECKING:
    from megatron_7b.data import Batch

_INPUTS = {"input_ids": "tokens", "labels": "labels", "loss_mask": "loss_mask", "position_ids": "position_ids"}
_FURTHER_INPUTS = ("tokentype_ids", "is_word_before")
"""Those that only some batches have."""


def model_inputs(batch: "Batch", device: torch.device, layout: ParallelLayout) -> dict[str, Any]:
    """Return what the model's forward takes of one microbatch, on the device.

    Where the batch knows its documents, its rows become a single one of b × s tokens, whose documents megatron-core's
    packed attention keeps apart; positions are counted from each document's beginning. Under context parallelism the
    rows remain, of which each rank has its positions, and our own attention keeps the documents apart.
    """
    names = _INPUTS | {name: name for name in _FURTHER_INPUTS if getattr(batch, name) is not None}
    inputs: dict[str, Any] = {
        name: torch.from_numpy(getattr(batch, array)).to(device, non_blocking=True) for name, array in names.items()
    }
    if batch.cu_seqlens is None:
        return _context_parallel_share(inputs, layout)
    if layout.cp_size > 1:
        packed = _packed_documents(batch.cu_seqlens, device, seq_length=batch.tokens.shape[1])
        return {**_context_parallel_share(inputs, layout), "packed_seq_params": packed}
    inputs = {name: rows.reshape(1, -1) for name, rows in inputs.items()}
    if batch.pair_labels is not None:
        inputs["pair_labels"] = torch.from_numpy(batch.pair_labels).to(device, non_blocking=True)
    return {**inputs, "packed_seq_params": _packed_documents(batch.cu_seqlens, device)}


def as_model_reads(rows: torch.Tensor, batch: "Batch", layout: ParallelLayout) -> torch.Tensor:
    """Return numbers of tokens, [b, s], in the rows in which the model gets the tokens, [rows, s/cp]; see above."""
    if batch.cu_seqlens is not None and layout.cp_size == 1:
        return rows.reshape(1, -1)
    return share_of(rows, layout.cp_rank, layout.cp_size, dim=1)


def encoder_decoder_inputs(batch: "Batch", device: torch.device, layout: ParallelLayout) -> dict[str, Any]:
    """Return what an encoder-decoder's forward takes of one microbatch, on the device.

    Texts and answers are filled up to multiples of the tensor-parallel size, as sequence parallelism divides them.
    """
    assert batch.decoder_tokens is not None
    arrays: dict[str, NDArray[Any]] = {
        "input_ids": batch.tokens,
        "decoder_input_ids": batch.decoder_tokens,
        "labels": batch.labels,
        "loss_mask": batch.loss_mask,
    }
    if batch.attention_mask is not None:
        arrays["attention_mask"] = batch.attention_mask
    elif batch.tokens.shape[1] % layout.tp_size:
        arrays["attention_mask"] = np.ones(batch.tokens.shape, dtype=bool)
    return {
        name: torch.from_numpy(_filled_up(rows, layout.tp_size)).to(device, non_blocking=True)
        for name, rows in arrays.items()
    }


def _filled_up(rows: NDArray[Any], multiple: int) -> NDArray[Any]:
    """Append zeros to rows [b, s]: tokens that the masks, filled up with zeros as well, hide."""
    return np.pad(rows, ((0, 0), (0, -rows.shape[1] % multiple)))


def _context_parallel_share(inputs: dict[str, Any], layout: ParallelLayout) -> dict[str, Any]:
    """Return this context-parallel rank's positions of arrays [b, s]."""
    return {name: share_of(rows, layout.cp_rank, layout.cp_size, dim=1) for name, rows in inputs.items()}


def _packed_documents(
    cu_seqlens: NDArray[np.int32], device: torch.device, *, seq_length: int | None = None
) -> PackedSeqParams:
    """Tell attention where documents begin: in one row of all tokens, or, given their length, in several rows."""
    cumulative = torch.from_numpy(cu_seqlens).to(device, non_blocking=True)
    longest = seq_length or int(np.diff(cu_seqlens).max())
    return PackedSeqParams(
        qkv_format="bshd" if seq_length else "thd",
        cu_seqlens_q=cumulative,
        cu_seqlens_kv=cumulative,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )
