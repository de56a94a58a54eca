"""config.json of the decoders of llama's kind.

Reads what transformers 4 and 5 write (`rope_theta` and `rope_scaling`, or `rope_parameters`) and writes a file that
both read.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from megatron_7b.config.architectures import ARCHITECTURES
from megatron_7b.config.model_config import with_layer_windows
from megatron_7b.config.schema import ModelConfig, RopeScalingConfig
from megatron_7b.conversion.config_values import ValueReader
from megatron_7b.conversion.windows import read_layer_windows, unwritable_windows, window_keys

_DEFAULTS: Mapping[str, object] = {
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


@dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """The codec of one architecture.

    Attributes:
        changed_defaults: What transformers assumes, where it differs from llama.
        refused_flags: Keys that switch on what the canonical model lacks.
        splits_hidden_size: Heads must share the hidden size evenly.
    """

    changed_defaults: Mapping[str, object]
    refused_flags: tuple[str, ...] = ()
    splits_hidden_size: bool = False

    @property
    def defaults(self) -> Mapping[str, object]:
        """What transformers assumes for a key that config.json leaves out."""
        return {**_DEFAULTS, **self.changed_defaults}

    @property
    def read_only_keys(self) -> frozenset[str]:
        """Keys that are read, and then written in another form or not at all."""
        keys = {"layer_types", "partial_rotary_factor", "original_max_position_embeddings"}
        return frozenset(keys | {"attention_bias", "mlp_bias"})

    def read(
        self, values: Mapping[str, object], reader: ValueReader, *, architecture: str, context: int | None
    ) -> ModelConfig:
        """Read the shape of a model."""
        rope = _rope_parameters(values)
        model = ModelConfig(
            architecture=architecture,
            num_layers=reader.integer("num_hidden_layers"),
            hidden_size=reader.integer("hidden_size"),
            ffn_hidden_size=reader.integer("intermediate_size"),
            num_attention_heads=reader.integer("num_attention_heads"),
            num_query_groups=reader.optional_integer("num_key_value_heads"),
            kv_channels=_head_width(reader),
            vocab_size=reader.integer("vocab_size"),
            max_position_embeddings=context or reader.integer("max_position_embeddings"),
            rotary_base=ValueReader(rope, reader.problems, "rope_parameters.").number("rope_theta", positive=True),
            rope_scaling=_rope_scaling(rope, values, reader.problems),
            norm_epsilon=reader.number("rms_norm_eps", positive=True),
            share_embeddings_and_output_weights=reader.flag("tie_word_embeddings"),
            **cast(Any, ARCHITECTURES[architecture].fixed),
            attention_dropout=reader.number("attention_dropout", default=0.0),
            init_method_std=reader.number("initializer_range"),
        )
        windows = read_layer_windows(
            values, model.traits.windows, model.num_layers, model.max_position_embeddings, reader.problems
        )
        return with_layer_windows(model, windows)

    def unrepresentable(self, values: Mapping[str, object]) -> list[str]:
        """List what the values ask for and the model does not compute."""
        problems = []
        if values.get("hidden_act") not in ("silu", "swish"):
            problems.append(f"hidden_act is {values.get('hidden_act')!r}, only 'silu' (SwiGLU) can be represented")
        problems.extend(
            f"{flag} is {values[flag]!r}: biases beyond query, key and value cannot be represented"
            for flag in self.refused_flags
            if values.get(flag)
        )
        return problems

    def impossible(self, values: Mapping[str, object], model: ModelConfig) -> list[str]:  # noqa: ARG002
        """List what is wrong with a model that was read, where every single value is right."""
        return _impossible_heads(model)

    def write(self, model: ModelConfig) -> dict[str, object]:
        """Return the keys that describe a model, but for its vocabulary."""
        return {
            "hidden_size": model.hidden_size,
            "intermediate_size": model.ffn_hidden_size,
            "num_hidden_layers": model.num_layers,
            "num_attention_heads": model.num_attention_heads,
            "num_key_value_heads": model.query_groups,
            "head_dim": model.head_width,
            "hidden_act": "silu",
            "max_position_embeddings": model.max_position_embeddings,
            "initializer_range": model.init_method_std,
            "rms_norm_eps": model.norm_epsilon,
            "tie_word_embeddings": model.share_embeddings_and_output_weights,
            "attention_dropout": model.attention_dropout,
            **_rope_keys(model),
            **dict.fromkeys(self.refused_flags, False),
            **window_keys(model, self.defaults),
        }

    def unwritable(self, model: ModelConfig) -> list[str]:
        """List what the architecture of a model cannot have."""
        problems = unwritable_windows(model)
        if self.splits_hidden_size and model.hidden_size % model.num_attention_heads:
            problems.append(
                f"model.hidden_size {model.hidden_size} is not a multiple of model.num_attention_heads "
                f"{model.num_attention_heads}, which LlamaConfig demands (mistral, qwen3: any head width)"
            )
        return problems


def _head_width(reader: ValueReader) -> int | None:
    """Return the width of a head, None if it is hidden_size / num_attention_heads, so that a model has one form."""
    width = reader.optional_integer("head_dim")
    regular = width is not None and width * reader.integer("num_attention_heads") == reader.integer("hidden_size")
    return None if regular else width


def _impossible_heads(model: ModelConfig) -> list[str]:
    problems = []
    groups = model.query_groups
    if model.num_attention_heads % groups:
        problems.append(
            f"num_attention_heads {model.num_attention_heads} is not a multiple of num_key_value_heads {groups}"
        )
    if model.kv_channels is None and model.hidden_size % model.num_attention_heads:
        problems.append(
            f"hidden_size {model.hidden_size} is not a multiple of num_attention_heads {model.num_attention_heads}, "
            "and head_dim is not given"
        )
    return problems


def _rope_parameters(values: Mapping[str, object]) -> dict[str, object]:
    """Return one dictionary made of the spellings of transformers 4 and 5, with transformers' precedence.

    Source: `RotaryEmbeddingConfigMixin.convert_rope_params_to_dict`, transformers 5.23.
    """
    given = values.get("rope_scaling") or values.get("rope_parameters") or {}
    parameters = dict(given) if isinstance(given, Mapping) else {"rope_type": given}
    parameters.setdefault("rope_theta", values["rope_theta"])
    parameters.setdefault("rope_type", parameters.get("type", "default"))
    if values.get("partial_rotary_factor") is not None:
        parameters.setdefault("partial_rotary_factor", values["partial_rotary_factor"])
    return parameters


def _rope_scaling(
    rope: Mapping[str, object], values: Mapping[str, object], problems: list[str]
) -> RopeScalingConfig | None:
    if rope.get("partial_rotary_factor") not in (None, 1, 1.0):
        problems.append(f"partial_rotary_factor is {rope['partial_rotary_factor']!r}, only 1 can be represented")
    if any(isinstance(value, Mapping) for value in rope.values()):
        problems.append("rope_parameters differ between layer types, which cannot be represented")
        return None
    if rope["rope_type"] == "default":
        return None
    if rope["rope_type"] != "llama3":
        problems.append(
            f"rope_parameters.rope_type is {rope['rope_type']!r}, only 'default' and 'llama3' are supported"
        )
        return None
    # transformers prefers the top-level key, and falls back to the context length.
    original = values.get("original_max_position_embeddings", rope.get("original_max_position_embeddings"))
    original = values["max_position_embeddings"] if original is None else original
    reader = ValueReader({**rope, "original_max_position_embeddings": original}, problems, "rope_parameters.")
    return RopeScalingConfig(
        factor=reader.number("factor", positive=True),
        low_freq_factor=reader.number("low_freq_factor", positive=True),
        high_freq_factor=reader.number("high_freq_factor", positive=True),
        original_max_position_embeddings=reader.integer("original_max_position_embeddings"),
    )


def _rope_keys(model: ModelConfig) -> dict[str, object]:
    scaling = model.rope_scaling
    parameters: dict[str, object] = {"rope_type": "default"}
    if scaling is not None:
        parameters = {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_position_embeddings,
        }
    return {
        "rope_parameters": {**parameters, "rope_theta": model.rotary_base},
        # What transformers 4 and servers built on it read.
        "rope_theta": model.rotary_base,
        "rope_scaling": None if scaling is None else parameters,
    }
