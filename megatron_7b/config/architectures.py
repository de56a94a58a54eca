"""The architectures of models that a configuration may name, and what follows from the name."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A model as Hugging Face names it.

    Attributes:
        kind: The kind of model that it is, one of `megatron_7b.model.kinds`.
        fixed: Options of the model section that have one possible value in it.
        normalization: LayerNorm has a bias and subtracts the mean; RMSNorm does neither.
        norm_placement: Before each attention and MLP, or after it is added to the residual stream.
        activation: Between the two linear layers of an MLP; `gelu` is the exact one, `gelu_tanh` its approximation.
        gated_linear_unit: The first linear layer has a second half that is multiplied with the activation.
        add_bias_linear: All linear layers of attention and MLP have biases.
        position_embedding_type: Rotary, or a learned vector per position.
        has_query_groups: Several query heads may share a key and value head, and heads may be of any width.
        has_tokentypes: The sentences of a pair may have embeddings that tell them apart.
    """

    kind: str
    fixed: Mapping[str, object] = field(default_factory=dict)
    normalization: Literal["RMSNorm", "LayerNorm"] = "RMSNorm"
    norm_placement: Literal["pre", "post"] = "pre"
    activation: Literal["silu", "gelu", "gelu_tanh"] = "silu"
    gated_linear_unit: bool = True
    add_bias_linear: bool = False
    position_embedding_type: Literal["rope", "learned_absolute"] = "rope"
    has_query_groups: bool = True
    has_tokentypes: bool = False


def _decoder(*, add_qkv_bias: bool = False, qk_layernorm: bool = False) -> Architecture:
    return Architecture(kind="decoder", fixed={"add_qkv_bias": add_qkv_bias, "qk_layernorm": qk_layernorm})


def _encoder(norm_placement: Literal["pre", "post"]) -> Architecture:
    return Architecture(
        kind="encoder",
        fixed={"add_qkv_bias": False, "qk_layernorm": False},
        normalization="LayerNorm",
        norm_placement=norm_placement,
        activation="gelu",
        gated_linear_unit=False,
        add_bias_linear=True,
        position_embedding_type="learned_absolute",
        has_query_groups=False,
        has_tokentypes=True,
    )


def _gpt2() -> Architecture:
    return Architecture(
        kind="decoder",
        fixed={"add_qkv_bias": False, "qk_layernorm": False},
        normalization="LayerNorm",
        activation="gelu_tanh",
        gated_linear_unit=False,
        add_bias_linear=True,
        position_embedding_type="learned_absolute",
        has_query_groups=False,
    )


ARCHITECTURES: dict[str, Architecture] = {
    "llama": _decoder(),
    "mistral": _decoder(),
    "qwen2": _decoder(add_qkv_bias=True),
    "qwen3": _decoder(qk_layernorm=True),
    "gpt2": _gpt2(),
    "bert": _encoder("post"),
    "megatron-bert": _encoder("pre"),
}
"""By Hugging Face's `model_type`. Add to it before a configuration that names the addition is read."""


def others_with(architecture: str, option: str, value: object) -> list[str]:
    """Name the architectures that are built alike, and have another value of an option that is fixed for each."""
    own = replace(ARCHITECTURES[architecture], fixed={})
    return [
        name
        for name, other in ARCHITECTURES.items()
        if other.fixed.get(option) == value and replace(other, fixed={}) == own
    ]
