"""config.json of T5, in its releases 1.0, 1.1 and Flan."""

from collections.abc import Mapping

from megatron_7b.config.schema import ModelConfig
from megatron_7b.conversion.config_values import ValueReader

_ARCHITECTURES: Mapping[str, str] = {"gated-gelu": "t5", "gated-gelu_new": "t5", "relu": "t5-v1.0"}
"""By `feed_forward_proj`."""
_OTHER_NAMES = {
    "d_model": "hidden_size",
    "num_heads": "num_attention_heads",
    "num_layers": "num_hidden_layers",
    "d_kv": "head_dim",
}
"""Names under which transformers takes the same."""
_SCALING = "scale_decoder_outputs"


class T5Config:
    """The codec.

    transformers reads from `tie_word_embeddings` whether the last hidden states are scaled, unless a key of its own
    says so. Whether weights are tied it sees from the weights, and so does the import.
    """

    defaults: Mapping[str, object] = {
        "vocab_size": 32128,
        "d_model": 512,
        "d_kv": 64,
        "d_ff": 2048,
        "num_layers": 6,
        "num_decoder_layers": None,
        "num_heads": 8,
        "relative_attention_num_buckets": 32,
        "relative_attention_max_distance": 128,
        "dropout_rate": 0.1,
        "layer_norm_epsilon": 1e-6,
        "feed_forward_proj": "relu",
        "tie_word_embeddings": True,
        _SCALING: None,
        "is_encoder_decoder": True,
        "is_decoder": False,
    }
    read_only_keys = frozenset({"dense_act_fn", "is_gated_act", *_OTHER_NAMES.values()})

    def read(
        self,
        values: Mapping[str, object],
        reader: ValueReader,
        *,
        architecture: str,  # noqa: ARG002 - the activation says which release it is
        context: int | None,
    ) -> ModelConfig:
        """Read the shape of a model, untied as long as nobody has looked at its weights."""
        values = {**values, **{name: values[other] for name, other in _OTHER_NAMES.items() if other in values}}
        reader = ValueReader(values, reader.problems)
        if context is not None:
            reader.problems.append(f"--max-position-embeddings is {context}, but the positions of T5 have no limit")
        of_encoder, of_decoder = reader.integer("num_layers"), reader.optional_integer("num_decoder_layers")
        is_scaled = reader.flag("tie_word_embeddings" if values[_SCALING] is None else _SCALING)
        dropout = reader.number("dropout_rate", default=0.0)
        return ModelConfig(
            architecture=_ARCHITECTURES.get(str(values["feed_forward_proj"]), "t5"),
            num_layers=of_encoder,
            num_decoder_layers=None if of_decoder == of_encoder else of_decoder,
            hidden_size=reader.integer("d_model"),
            ffn_hidden_size=reader.integer("d_ff"),
            num_attention_heads=reader.integer("num_heads"),
            kv_channels=reader.integer("d_kv"),
            vocab_size=reader.integer("vocab_size"),
            relative_attention_num_buckets=reader.integer("relative_attention_num_buckets"),
            relative_attention_max_distance=reader.integer("relative_attention_max_distance"),
            norm_epsilon=reader.number("layer_norm_epsilon", positive=True),
            scale_output_states=is_scaled,
            hidden_dropout=dropout,
            attention_dropout=dropout,
        )

    def unrepresentable(self, values: Mapping[str, object]) -> list[str]:
        """List what the values ask for and the model does not compute."""
        problems = []
        if values["feed_forward_proj"] not in _ARCHITECTURES:
            problems.append(
                f"feed_forward_proj is {values['feed_forward_proj']!r}, only {', '.join(_ARCHITECTURES)} can be "
                "represented"
            )
        if values["is_decoder"] or not values["is_encoder_decoder"]:
            problems.append("is_decoder or is_encoder_decoder says that one of the two stacks is missing")
        return problems

    def impossible(self, values: Mapping[str, object], model: ModelConfig) -> list[str]:  # noqa: ARG002
        """Return nothing: the rules of the configuration say what is wrong."""
        return []

    def write(self, model: ModelConfig) -> dict[str, object]:
        """Return the keys that describe a model, but for its vocabulary."""
        return {
            "d_model": model.hidden_size,
            "d_kv": model.head_width,
            "d_ff": model.ffn_hidden_size,
            "num_layers": model.num_layers,
            "num_decoder_layers": model.decoder_layers,
            "num_heads": model.num_attention_heads,
            "relative_attention_num_buckets": model.relative_attention_num_buckets,
            "relative_attention_max_distance": model.relative_attention_max_distance,
            "dropout_rate": model.hidden_dropout,
            "layer_norm_epsilon": model.norm_epsilon,
            "feed_forward_proj": "gated-gelu" if model.traits.gated_linear_unit else "relu",
            "tie_word_embeddings": model.scale_output_states,
            _SCALING: model.scale_output_states,
            "is_encoder_decoder": True,
        }

    def unwritable(self, model: ModelConfig) -> list[str]:
        """List what the architecture of a model cannot have."""
        dropouts = model.hidden_dropout, model.attention_dropout
        if len(set(dropouts)) == 1:
            return []
        problem = "model.hidden_dropout is {} and model.attention_dropout {}, T5 of transformers has one dropout_rate"
        return [problem.format(*dropouts)]
