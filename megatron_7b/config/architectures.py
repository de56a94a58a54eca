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
        position_embedding_type: Rotary, a learned vector per position, or learned biases of scores by distance.
        softmax_scale: Factor of attention scores; None: 1 / sqrt(width of a head).
        has_query_groups: Several query heads may share a key and value head, and heads may be of any width.
        has_wide_heads: Heads may be of any width, without query groups.
        has_experts: Each layer has several MLPs, of which a token uses a few.
        has_tokentypes: The sentences of a pair may have embeddings that tell them apart.
        windows: Whether attention may be to a window of the newest tokens, and then in which layers.
    """

    kind: str
    fixed: Mapping[str, object] = field(default_factory=dict)
    normalization: Literal["RMSNorm", "LayerNorm"] = "RMSNorm"
    norm_placement: Literal["pre", "post"] = "pre"
    activation: Literal["silu", "gelu", "gelu_tanh", "relu"] = "silu"
    gated_linear_unit: bool = True
    add_bias_linear: bool = False
    position_embedding_type: Literal["rope", "learned_absolute", "relative"] = "rope"
    softmax_scale: float | None = None
    has_query_groups: bool = True
    has_wide_heads: bool = False
    has_experts: bool = False
    has_tokentypes: bool = False
    windows: Literal["none", "all layers", "some layers"] = "none"


def _decoder(
    windows: Literal["none", "all layers", "some layers"],
    *,
    add_qkv_bias: bool = False,
    qk_layernorm: bool = False,
    has_experts: bool = False,
) -> Architecture:
    fixed = {"add_qkv_bias": add_qkv_bias, "qk_layernorm": qk_layernorm}
    return Architecture(kind="decoder", fixed=fixed, has_experts=has_experts, windows=windows)


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


def _t5(activation: Literal["gelu_tanh", "relu"], *, is_gated: bool) -> Architecture:
    return Architecture(
        kind="encoder_decoder",
        fixed={"add_qkv_bias": False, "qk_layernorm": False},
        activation=activation,
        gated_linear_unit=is_gated,
        position_embedding_type="relative",
        softmax_scale=1.0,
        has_query_groups=False,
        has_wide_heads=True,
    )


ARCHITECTURES: dict[str, Architecture] = {
    "llama": _decoder("none"),
    "mistral": _decoder("all layers"),
    "qwen2": _decoder("some layers", add_qkv_bias=True),
    "qwen3": _decoder("some layers", qk_layernorm=True),
    "mixtral": _decoder("all layers", has_experts=True),
    "qwen3_moe": _decoder("all layers", qk_layernorm=True, has_experts=True),
    "gpt2": _gpt2(),
    "bert": _encoder("post"),
    "megatron-bert": _encoder("pre"),
    "t5": _t5("gelu_tanh", is_gated=True),
    "t5-v1.0": _t5("relu", is_gated=False),
}
"""By Hugging Face's `model_type`, which T5's first release shares with 1.1 and Flan. Add to it before a configuration
that names the addition is read."""


def others_with(architecture: str, option: str, value: object) -> list[str]:
    """Name the architectures that are built alike, and have another value of an option that is fixed for each."""
    own = replace(ARCHITECTURES[architecture], fixed={}, windows="none")
    return [
        name
        for name, other in ARCHITECTURES.items()
        if other.fixed.get(option) == value and replace(other, fixed={}, windows="none") == own
    ]
