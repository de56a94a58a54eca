"""config.json of BERT and of Megatron's BERT."""

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_7b.config.schema import ModelConfig
from megatron_7b.conversion.config_values import ValueReader

_FIXED: Mapping[str, object] = {"is_decoder": False, "add_cross_attention": False, "hidden_act": "gelu"}
_POSITIONS = "position_embedding_type"
"""A key of transformers 4; there is one value of it left in transformers 5."""


@dataclass(frozen=True, kw_only=True)
class BertConfig:
    """The codec of one of the two.

    Attributes:
        changed_defaults: What transformers assumes, where it differs from BERT's base model.
    """

    changed_defaults: Mapping[str, object]

    @property
    def defaults(self) -> Mapping[str, object]:
        """What transformers assumes for a key that config.json leaves out."""
        return {
            "vocab_size": 30522,
            "hidden_size": 768,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "intermediate_size": 3072,
            "hidden_dropout_prob": 0.1,
            "attention_probs_dropout_prob": 0.1,
            "max_position_embeddings": 512,
            "type_vocab_size": 2,
            "initializer_range": 0.02,
            "layer_norm_eps": 1e-12,
            "tie_word_embeddings": True,
            _POSITIONS: "absolute",
            **_FIXED,
            **self.changed_defaults,
        }

    @property
    def read_only_keys(self) -> frozenset[str]:
        """Keys that are read, and then written in another form or not at all."""
        return frozenset({_POSITIONS})

    def read(
        self,
        values: Mapping[str, object],  # noqa: ARG002
        reader: ValueReader,
        *,
        architecture: str,
        context: int | None,
    ) -> ModelConfig:
        """Read the shape of a model."""
        if context is not None:
            reader.problems.append(
                f"--max-position-embeddings is {context}, but the positions of this model are learned: all of them are "
                "weights of it"
            )
        return ModelConfig(
            architecture=architecture,
            num_layers=reader.integer("num_hidden_layers"),
            hidden_size=reader.integer("hidden_size"),
            ffn_hidden_size=reader.integer("intermediate_size"),
            num_attention_heads=reader.integer("num_attention_heads"),
            vocab_size=reader.integer("vocab_size"),
            max_position_embeddings=reader.integer("max_position_embeddings"),
            num_tokentypes=reader.integer("type_vocab_size"),
            norm_epsilon=reader.number("layer_norm_eps", positive=True),
            share_embeddings_and_output_weights=reader.flag("tie_word_embeddings"),
            hidden_dropout=reader.number("hidden_dropout_prob", default=0.0),
            attention_dropout=reader.number("attention_probs_dropout_prob", default=0.0),
            init_method_std=reader.number("initializer_range"),
        )

    def unrepresentable(self, values: Mapping[str, object]) -> list[str]:
        """List what the values ask for and the model does not compute."""
        needed = {**_FIXED, _POSITIONS: "absolute"}
        return [
            f"{key} is {values[key]!r}, only {value!r} can be represented"
            for key, value in needed.items()
            if values[key] != value
        ]

    def impossible(self, values: Mapping[str, object], model: ModelConfig) -> list[str]:  # noqa: ARG002
        """List what is wrong with a model that was read, where every single value is right."""
        if model.hidden_size % model.num_attention_heads == 0:
            return []
        return [f"hidden_size {model.hidden_size} is not a multiple of num_attention_heads {model.num_attention_heads}"]

    def write(self, model: ModelConfig) -> dict[str, object]:
        """Return the keys that describe a model, but for its vocabulary."""
        return {
            "hidden_size": model.hidden_size,
            "num_hidden_layers": model.num_layers,
            "num_attention_heads": model.num_attention_heads,
            "intermediate_size": model.ffn_hidden_size,
            "hidden_dropout_prob": model.hidden_dropout,
            "attention_probs_dropout_prob": model.attention_dropout,
            "max_position_embeddings": model.max_position_embeddings,
            "type_vocab_size": model.num_tokentypes,
            "initializer_range": model.init_method_std,
            "layer_norm_eps": model.norm_epsilon,
            "tie_word_embeddings": model.share_embeddings_and_output_weights,
            **_FIXED,
        }

    def unwritable(self, model: ModelConfig) -> list[str]:
        """List what the architecture of a model cannot have."""
        if model.num_tokentypes:
            return []
        return [f"model.num_tokentypes is 0, {model.architecture} of transformers has at least one"]
