"""The section of a configuration that says what a model learns from another one, its teacher."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class DistillationConfig:
    """What a model learns from a larger one beside its data; nothing unless a teacher is named."""

    teacher: str | None = None
    """Checkpoint or Hugging Face folder of the teacher, which has the same tokens; it runs in the same job."""
    cached_logits: str | None = None
    """What `megatron-7b compress cache-logits` has written for the samples of this run, in the place of a teacher."""
    teacher_dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Number format that the teacher computes in; auto: that of the run."""
    teacher_tensor_model_parallel_size: int | None = None
    """Ranks that share each layer of the teacher, a multiple of the student's: for one too large for its layout."""
    temperature: float = 1.0
    """What both models' logits are divided by before they are compared; the distance is multiplied by its square."""
    alpha: float = 0.5
    """Share of the distance in the loss: (1 - alpha) * task loss + alpha * temperature^2 * distance; 1: it alone."""
    loss: Literal["forward_kl", "reverse_kl", "jsd"] = "forward_kl"
    """Distance of two distributions: KL(teacher || student), KL(student || teacher), or one in between."""
    jsd_beta: float = 0.5
    """jsd: weight of the teacher in the mixture that both are compared with."""
    hidden: bool = False
    """Compare hidden states as well: after the embedding, and after each layer that one of the teacher's belongs to."""
    hidden_weight: float = 1.0
    """What the mean squared difference of hidden states counts in the loss."""
    attention: Literal["none", "kl", "scores"] = "none"
    """Encoders: compare attention, its probabilities by KL(teacher || student) or its scores by squared differences."""
    attention_weight: float = 1.0
    """What the difference of attention counts in the loss."""
    layer_map: tuple[int, ...] = ()
    """For each layer of the student the teacher's that it is compared with, from 1, or 0 for none; empty: evenly."""

    @property
    def compares_layers(self) -> bool:
        """Whether more than predictions is compared."""
        return self.hidden or self.attention != "none"

    @property
    def is_used(self) -> bool:
        """Whether there is a teacher, or what one has said."""
        return self.teacher is not None or self.cached_logits is not None
