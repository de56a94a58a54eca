"""The section `optimizer`: the optimizer, its own options, and its schedule."""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from megatron_7b.config.one_of import OneOf
from megatron_7b.config.optimizers import OPTIMIZERS


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The optimizer, its own options, and its schedule."""

    name: Annotated[str, OneOf(OPTIMIZERS)] = "adamw"
    """adamw; adam: weight decay in the gradient; sgd: with momentum; muon: for the matrices of layers, else AdamW."""
    lr: float = 3e-4
    """Peak learning rate."""
    min_lr: float = 3e-5
    """Learning rate at the end of the decay."""
    adam_beta1: float = 0.9
    """adamw, adam, muon: decay of the first moment."""
    adam_beta2: float = 0.95
    """adamw, adam, muon: decay of the second moment."""
    adam_eps: float = 1e-8
    """adamw, adam, muon: added to the square root of the second moment."""
    sgd_momentum: float = 0.9
    """sgd: share of the last update that is added to the gradient; 0 keeps no state."""
    sgd_nesterov: bool = False
    """sgd: look ahead by one application of the momentum."""
    muon_momentum: float = 0.95
    """muon: decay of the mean of the gradients that is orthogonalized."""
    muon_nesterov: bool = True
    """muon: look ahead by one application of the momentum."""
    muon_num_ns_steps: int = 5
    """muon: Newton-Schulz steps of the orthogonalization."""
    muon_scale_mode: Literal["spectral", "shape_scaling", "unit_rms_norm"] = "spectral"
    """muon: update of an [r, c] matrix times sqrt(max(r, c)), sqrt(max(1, r / c)) or sqrt(r / c)."""
    muon_extra_scale_factor: float = 0.2
    """muon: a further factor; 0.2 with spectral makes updates as large as AdamW's, so that its learning rates fit."""
    muon_matmul_dtype: Literal["fp32", "bf16"] = "fp32"
    """muon: format of the Newton-Schulz steps; bf16 is faster on GPUs, but layouts then agree to its digits only."""
    muon_adamw_lr: float | None = None
    """muon: peak learning rate of embeddings, output layer, norms and biases, on the same schedule; None means lr."""
    cpu_offload: bool = False
    """adamw, adam: keep both moments in host memory, from where they visit the GPU for each update; no effect on a CPU,
    where they are in host memory anyway."""
    weight_decay: float = 0.1
    """Decoupled weight decay, or with adam and sgd added to the gradient; norms and biases are exempt."""
    clip_grad: float = 1.0
    """Largest global L2 norm of the gradients, which are scaled down to it; 0 turns clipping off."""
    lr_decay_style: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """Shape after the warm-up; wsd holds the peak and decays only at the end."""
    lr_warmup_steps: int = 0
    """Steps over which the learning rate rises to its peak."""
    lr_warmup_fraction: float | None = None
    """The same as a share of the steps until the decay ends, rounded up; if set, lr_warmup_steps has no effect."""
    lr_decay_steps: int | None = None
    """Step at which min_lr is reached; None means training.train_steps."""
    lr_wsd_decay_steps: int | None = None
    """Length of the final decay of the wsd style; None means a tenth of lr_decay_steps."""

    def warmup_steps(self, train_steps: int) -> int:
        """Return over how many steps the rate of a run of some length rises, which may be given as a share of them."""
        if self.lr_warmup_fraction is None:
            return self.lr_warmup_steps
        return math.ceil(self.lr_warmup_fraction * (self.lr_decay_steps or train_steps))
