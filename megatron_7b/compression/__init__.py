"""Smaller models from larger ones: quantised folders, pruned checkpoints, logits that a student learns from."""

from megatron_7b.compression.calibration import read_calibration

__all__ = ["read_calibration"]
