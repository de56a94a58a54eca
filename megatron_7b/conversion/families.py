"""The supported Hugging Face architectures: their names and their options.

A family is data: adding a decoder of the same kind means adding a row here. The names of its tensors are in the table
of its kind (`model/kinds`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Family:
    """One Hugging Face architecture."""

    model_type: str
    """A key of `config.architectures`."""
    class_name: str
    """Entry of config.json's `architectures`."""
    defaults: Mapping[str, object]
    """What transformers assumes for a key that config.json leaves out."""
    refused_flags: tuple[str, ...] = ()
    """Keys that switch on what the canonical model lacks."""
    sliding_window: Literal["none", "all layers", "some layers"] = "none"
    """Whether the window key is read, and for which layers."""


_SHARED_DEFAULTS: Mapping[str, object] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "attention_dropout": 0.0,
}

_QWEN_DEFAULTS: Mapping[str, object] = {
    **_SHARED_DEFAULTS,
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}

FAMILIES: Mapping[str, Family] = {
    family.model_type: family
    for family in (
        Family(
            model_type="llama",
            class_name="LlamaForCausalLM",
            defaults=_SHARED_DEFAULTS,
            refused_flags=("attention_bias", "mlp_bias"),
        ),
        Family(
            model_type="mistral",
            class_name="MistralForCausalLM",
            defaults={
                **_SHARED_DEFAULTS,
                "intermediate_size": 14336,
                "num_key_value_heads": 8,
                "max_position_embeddings": 131072,
                "sliding_window": 4096,
            },
            sliding_window="all layers",
        ),
        Family(
            model_type="qwen2",
            class_name="Qwen2ForCausalLM",
            defaults=_QWEN_DEFAULTS,
            sliding_window="some layers",
        ),
        Family(
            model_type="qwen3",
            class_name="Qwen3ForCausalLM",
            defaults={**_QWEN_DEFAULTS, "head_dim": 128},
            refused_flags=("attention_bias",),
            sliding_window="some layers",
        ),
    )
}
