"""A smaller model from the weights of a larger one: fewer layers, heads, neurons, channels, chosen on text.

`plan` decides, without torch, what the smaller model is; `measuring` sends text through the larger one on all its
ranks; `scores` chooses; `weights` cuts, one tensor at a time; `checkpoint` is the whole road.

Run: `megatron-7b compress prune --checkpoint RUN/checkpoints/latest --output FOLDER --calibration F --num-layers 24`
"""

from megatron_7b.compression.pruning.checkpoint import CalibrationText, check_pruning, prune_checkpoint
from megatron_7b.compression.pruning.plan import PruneOptions, PruningPlan, plan_pruning
from megatron_7b.compression.pruning.result import PrunedCheckpoint

__all__ = [
    "CalibrationText",
    "PruneOptions",
    "PrunedCheckpoint",
    "PruningPlan",
    "check_pruning",
    "plan_pruning",
    "prune_checkpoint",
]
