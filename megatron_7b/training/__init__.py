"""Training: `assemble` builds everything, `step` does one update, `loop` repeats it, `hooks` act around it."""

from megatron_7b.training.loop import pretrain

__all__ = ["pretrain"]
