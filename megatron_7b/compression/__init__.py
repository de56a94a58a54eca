"""Smaller models from larger ones: quantised folders, pruned checkpoints, logits that a student learns from."""

from megatron_7b.compression.caching import CacheOptions, cache_logits
from megatron_7b.compression.calibration import read_calibration
from megatron_7b.compression.pruning import CalibrationText, PrunedCheckpoint, PruneOptions, prune_checkpoint
from megatron_7b.compression.pruning.sparse_checkpoint import SparseCheckpoint, SparseOptions, sparsify_checkpoint
from megatron_7b.compression.quantization.options import QuantizeOptions
from megatron_7b.compression.quantization.quantizing import quantize
from megatron_7b.compression.quantization.result import LayerError, Quantized

__all__ = [
    "CacheOptions",
    "CalibrationText",
    "LayerError",
    "PruneOptions",
    "PrunedCheckpoint",
    "QuantizeOptions",
    "Quantized",
    "SparseCheckpoint",
    "SparseOptions",
    "cache_logits",
    "prune_checkpoint",
    "quantize",
    "read_calibration",
    "sparsify_checkpoint",
]
