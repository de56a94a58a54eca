"""Fine-tuning: what a run starts from and reads is prepared from what users have; then it is a run like any other."""

from megatron_7b.finetune.preparing import check_asked, prepare_finetuning
from megatron_7b.finetune.teacher import prepare_teacher

__all__ = ["check_asked", "prepare_finetuning", "prepare_teacher"]
