"""The section `adapter`: what is trained beside a model that stays as it is; which option is of which method."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """Few parameters that learn beside a model that stays as it is."""

    method: Literal["none", "lora", "dora", "adalora", "qlora", "bottleneck"] = "none"
    """lora: low-rank updates of matrices; dora: and their row norms; adalora: with ranks that are shared out as needed;
    qlora: lora on a 4-bit model; bottleneck: small MLPs after attention and MLP; none: the model itself is trained."""
    rank: int = 8
    """lora, dora, qlora: rank of the updates."""
    alpha: float = 16.0
    """All but bottleneck: updates are multiplied by alpha / rank."""
    use_rslora: bool = False
    """lora, dora, qlora: multiply by alpha / sqrt(rank) instead, which suits high ranks."""
    dropout: float = 0.0
    """Share of an adapter's inputs that training leaves out."""
    target_modules: tuple[str, ...] = ()
    """Hugging Face names of the linear layers that are adapted, such as q_proj or layers.3.mlp.down_proj; all-linear or
    nothing: all of attention and MLP. bottleneck: those whose outputs are adapted; nothing: o_proj and down_proj."""
    modules_to_save: tuple[str, ...] = ()
    """Hugging Face names of modules that are trained and saved as a whole, such as embed_tokens or lm_head."""
    bottleneck_size: int = 64
    """bottleneck: width between down- and up-projection."""
    bottleneck_activation: Literal["relu", "gelu", "silu"] = "gelu"
    """bottleneck: what is applied in between."""
    initial_rank: int = 12
    """adalora: rank of every update at first."""
    target_rank: int = 8
    """adalora: average rank at the end."""
    tinit: int = 0
    """adalora: steps before ranks begin to fall."""
    tfinal: int = 0
    """adalora: steps at the end during which ranks stay as they are."""
    delta_t: int = 1
    """adalora: steps between two distributions of the ranks."""
    beta1: float = 0.85
    """adalora: decay of the mean sensitivity."""
    beta2: float = 0.85
    """adalora: decay of its mean deviation."""
    orth_reg_weight: float = 0.5
    """adalora: weight of the term that keeps the factors orthogonal."""
    quantization: Literal["nf4"] = "nf4"
    """qlora: format of the model's matrices."""

    @property
    def is_used(self) -> bool:
        """Whether there is an adapter."""
        return self.method != "none"


_LOW_RANK = ("lora", "dora", "qlora")
_ADALORA = ("initial_rank", "target_rank", "tinit", "tfinal", "delta_t", "beta1", "beta2", "orth_reg_weight")
_OF_SOME_METHODS: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("rank", "use_rslora"), _LOW_RANK),
    "alpha": (*_LOW_RANK, "adalora"),
    **dict.fromkeys(_ADALORA, ("adalora",)),
    "quantization": ("qlora",),
    **dict.fromkeys(("bottleneck_size", "bottleneck_activation"), ("bottleneck",)),
}


METHOD = "adapter.method"
"""The option that decides about the others."""


def fields_of_other_methods(method: object) -> frozenset[str]:
    """Return the paths of options that mean nothing to a method."""
    names = (field.name for field in fields(AdapterConfig))
    return frozenset(
        f"adapter.{name}"
        for name in names
        if name != "method" and method not in (methods_with(name) or (() if method == "none" else (method,)))
    )


def methods_with(option: str) -> tuple[str, ...] | None:
    """Return the methods that an option of the section belongs to; None: to all of them."""
    return _OF_SOME_METHODS.get(option)
