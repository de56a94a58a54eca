"""The architectures of models that a configuration may name, and what follows from the name."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A model as Hugging Face names it.

    Attributes:
        kind: The kind of model that it is, one of `megatron_7b.model.kinds`.
        fixed: Options of the model section that have one possible value in it.
    """

    kind: str
    fixed: Mapping[str, object] = field(default_factory=dict)


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(kind="decoder", fixed={"add_qkv_bias": False, "qk_layernorm": False}),
    "mistral": Architecture(kind="decoder", fixed={"add_qkv_bias": False, "qk_layernorm": False}),
    "qwen2": Architecture(kind="decoder", fixed={"add_qkv_bias": True, "qk_layernorm": False}),
    "qwen3": Architecture(kind="decoder", fixed={"add_qkv_bias": False, "qk_layernorm": True}),
}
"""By Hugging Face's `model_type`. Add to it before a configuration that names the addition is read."""
