"""config.json of GPT-2."""

from collections.abc import Mapping

from megatron_7b.config.schema import ModelConfig
from megatron_7b.conversion.config_values import ValueReader

_OTHER_NAMES = {
    "n_embd": "hidden_size",
    "n_positions": "max_position_embeddings",
    "n_head": "num_attention_heads",
    "n_layer": "num_hidden_layers",
}
"""Names under which transformers takes the same."""
_APPROXIMATE_GELU = ("gelu_new", "gelu_pytorch_tanh")
_FIXED: Mapping[str, object] = {
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}
_DROPOUTS = ("resid_pdrop", "embd_pdrop")


class Gpt2Config:
    """The codec."""

    defaults: Mapping[str, object] = {
        "vocab_size": 50257,
        "n_positions": 1024,
        "n_embd": 768,
        "n_layer": 12,
        "n_head": 12,
        "n_inner": None,
        "activation_function": "gelu_new",
        "resid_pdrop": 0.1,
        "embd_pdrop": 0.1,
        "attn_pdrop": 0.1,
        "layer_norm_epsilon": 1e-5,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        **_FIXED,
    }
    read_only_keys = frozenset({"n_ctx", *_OTHER_NAMES.values()})

    def read(
        self, values: Mapping[str, object], reader: ValueReader, *, architecture: str, context: int | None
    ) -> ModelConfig:
        """Read the shape of a model."""
        values = {**values, **{name: values[other] for name, other in _OTHER_NAMES.items() if other in values}}
        reader = ValueReader(values, reader.problems)
        hidden_size = reader.integer("n_embd")
        _refuse_context(context, reader)
        return ModelConfig(
            architecture=architecture,
            num_layers=reader.integer("n_layer"),
            hidden_size=hidden_size,
            ffn_hidden_size=reader.optional_integer("n_inner") or 4 * hidden_size,
            num_attention_heads=reader.integer("n_head"),
            vocab_size=reader.integer("vocab_size"),
            max_position_embeddings=reader.integer("n_positions"),
            norm_epsilon=reader.number("layer_norm_epsilon", positive=True),
            share_embeddings_and_output_weights=reader.flag("tie_word_embeddings"),
            hidden_dropout=reader.number("resid_pdrop", default=0.0),
            attention_dropout=reader.number("attn_pdrop", default=0.0),
            init_method_std=reader.number("initializer_range"),
        )

    def unrepresentable(self, values: Mapping[str, object]) -> list[str]:
        """List what the values ask for and the model does not compute."""
        problems = [
            f"{key} is {values[key]!r}, only {needed} can be represented"
            for key, needed in _FIXED.items()
            if values[key] != needed
        ]
        if values["activation_function"] not in _APPROXIMATE_GELU:
            problems.append(
                f"activation_function is {values['activation_function']!r}, only {' and '.join(_APPROXIMATE_GELU)}, "
                "which are the same, can be represented"
            )
        return problems

    def impossible(self, values: Mapping[str, object], model: ModelConfig) -> list[str]:  # noqa: ARG002
        """List what is wrong with a model that was read, where every single value is right."""
        if model.hidden_size % model.num_attention_heads == 0:
            return []
        return [f"n_embd {model.hidden_size} is not a multiple of n_head {model.num_attention_heads}"]

    def write(self, model: ModelConfig) -> dict[str, object]:
        """Return the keys that describe a model, but for its vocabulary."""
        return {
            "n_positions": model.max_position_embeddings,
            "n_embd": model.hidden_size,
            "n_layer": model.num_layers,
            "n_head": model.num_attention_heads,
            "n_inner": model.ffn_hidden_size,
            "activation_function": "gelu_new",
            **dict.fromkeys(_DROPOUTS, model.hidden_dropout),
            "attn_pdrop": model.attention_dropout,
            "layer_norm_epsilon": model.norm_epsilon,
            "initializer_range": model.init_method_std,
            "tie_word_embeddings": model.share_embeddings_and_output_weights,
            **_FIXED,
        }

    def unwritable(self, model: ModelConfig) -> list[str]:  # noqa: ARG002
        """Return nothing: the rules of the configuration let pass only what can be written."""
        return []


def _refuse_context(context: int | None, reader: ValueReader) -> None:
    if context is not None:
        reader.problems.append(
            f"--max-position-embeddings is {context}, but the positions of this model are learned: all of them are "
            "weights of it"
        )
