"""A larger model from the weights of a smaller one, with proof that it computes the same where that is promised.

`plan` decides, without torch, what the larger model is; `axes` says what the dimensions of a parameter are; `widening`
and `weights` make the larger tensors, one at a time; `checkpoint` is the whole road.

Run: `megatron-7b convert grow --checkpoint RUN/checkpoints/latest --output FOLDER --num-layers 8`
"""

from megatron_7b.conversion.growing.checkpoint import GrownCheckpoint, grow_checkpoint
from megatron_7b.conversion.growing.plan import GrowOptions, Growth, plan_growth

__all__ = ["GrowOptions", "GrownCheckpoint", "Growth", "grow_checkpoint", "plan_growth"]
