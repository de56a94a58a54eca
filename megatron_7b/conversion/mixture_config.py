"""config.json of mixtures of experts: decoders of llama's kind with several MLPs per layer."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from megatron_7b.config.schema import ModelConfig
from megatron_7b.conversion.config_values import ValueReader
from megatron_7b.conversion.llama_config import LlamaConfig


@dataclass(frozen=True, kw_only=True)
class MixtureConfig(LlamaConfig):
    """The codec of one architecture.

    Attributes:
        number_keys: Under which the number of experts may be; the first is written.
        default_number: What transformers assumes if none of them is there.
        width_key: The inner width of an expert; None: `intermediate_size` is.
        share_key: Says whether the weights of a token's experts add up to 1; None: they always do.
        dense_keys: Say which layers have a single MLP.
    """

    number_keys: tuple[str, ...]
    default_number: int
    width_key: str | None = None
    share_key: str | None = None
    dense_keys: tuple[str, ...] = ()

    @property
    def read_only_keys(self) -> frozenset[str]:
        """Keys that are read, and then written in another form or not at all."""
        return super().read_only_keys | frozenset(self.number_keys)

    def read(
        self, values: Mapping[str, object], reader: ValueReader, *, architecture: str, context: int | None
    ) -> ModelConfig:
        """Read the shape of a model. How strongly it was balanced is not part of it."""
        model = super().read(values, reader, architecture=architecture, context=context)
        given = next((key for key in self.number_keys if values.get(key) is not None), None)
        width = None if self.width_key is None else reader.integer(self.width_key)
        return replace(
            model,
            num_moe_experts=self.default_number if given is None else reader.integer(given),
            moe_router_topk=reader.integer("num_experts_per_tok"),
            moe_ffn_hidden_size=width,
            moe_router_pre_softmax=self.share_key is not None and not reader.flag(self.share_key),
        )

    def unrepresentable(self, values: Mapping[str, object]) -> list[str]:
        """List what the values ask for and the model does not compute."""
        problems = super().unrepresentable(values)
        step, named = values.get("decoder_sparse_step", 1), values.get("mlp_only_layers")
        if "decoder_sparse_step" in self.dense_keys and step != 1:
            problems.append(
                f"decoder_sparse_step is {step!r}: layers without experts among others cannot be represented"
            )
        if "mlp_only_layers" in self.dense_keys and named:
            problems.append(f"mlp_only_layers is {named!r}: layers without experts among others cannot be represented")
        return problems

    def impossible(self, values: Mapping[str, object], model: ModelConfig) -> list[str]:
        """List what is wrong with a model that was read, where every single value is right."""
        problems = super().impossible(values, model)
        if model.moe_router_topk > (model.num_moe_experts or 1):
            problems.append(
                f"num_experts_per_tok is {model.moe_router_topk}, but there are {model.num_moe_experts} experts"
            )
        return problems

    def write(self, model: ModelConfig) -> dict[str, object]:
        """Return the keys that describe a model, but for its vocabulary."""
        assert model.num_moe_experts is not None
        keys = {
            **super().write(model),
            self.number_keys[0]: model.num_moe_experts,
            "num_experts_per_tok": model.moe_router_topk,
        }
        if self.width_key is None:
            keys["intermediate_size"] = model.expert_width
        else:
            keys[self.width_key] = model.expert_width
        if self.share_key is not None:
            keys[self.share_key] = not model.moe_router_pre_softmax
        return {**keys, **{key: 1 if key == "decoder_sparse_step" else [] for key in self.dense_keys}}

    def unwritable(self, model: ModelConfig) -> list[str]:
        """List what the architecture of a model cannot have."""
        problems = super().unwritable(model)
        if self.share_key is None and model.moe_router_pre_softmax:
            problems.append("model.moe_router_pre_softmax is True; its experts are weighed among those a token uses")
        return problems
