"""Smaller models from larger ones: quantised folders, pruned checkpoints, logits that a student learns from."""
