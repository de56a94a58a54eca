"""The supported Hugging Face architectures: how their config.json is read, and which names their tensors have had.

The names that tensors have now are in the table of the kind of model (`model/kinds`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from megatron_7b.config.schema import ModelConfig
from megatron_7b.conversion.bert_config import BertConfig
from megatron_7b.conversion.config_codec import ConfigCodec
from megatron_7b.conversion.gpt2_config import Gpt2Config
from megatron_7b.conversion.heads import HEAD_NAMES, class_of_head, head_classes, names_of_head
from megatron_7b.conversion.llama_config import LlamaConfig
from megatron_7b.conversion.mixture_config import MixtureConfig
from megatron_7b.conversion.t5_config import T5Config


@dataclass(frozen=True, kw_only=True)
class OtherNames:
    """How the tensors of a folder may differ from those that an export has.

    Attributes:
        base: Begins all names but those of heads; a folder of the model without heads leaves it out everywhere.
        endings: Former endings of names, and what they are called now.
        buffers: A pattern of names of what every model computes from its configuration.
        foreign_heads: Beginnings of the names of heads that the model does not have; they are left out.
        heads: Beginnings of the names of the model's own heads, each of which a folder may lack.
    """

    base: str = ""
    endings: Mapping[str, str]
    buffers: str
    foreign_heads: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Family:
    """One Hugging Face architecture.

    Attributes:
        model_type: Of config.json.
        class_name: Entry of config.json's `architectures` in an export.
        codec: Reads and writes config.json.
        other_names: How folders that can be imported differ in the names of tensors.
        other_classes: Further entries of `architectures` whose folders can be imported.
        auto_class: What transformers loads it with.
        output_layer: A tensor that says by its presence that weights are not tied; None: config.json says so.
        pair_class: Entry of `architectures` where the model classifies pairs of sentences as well.
        prefix: Begins the names of the classes with a head in the place of the output layer; None: there are none.
    """

    model_type: str
    class_name: str
    codec: ConfigCodec
    other_names: OtherNames
    other_classes: tuple[str, ...] = ()
    auto_class: Literal["AutoModelForCausalLM", "AutoModelForMaskedLM", "AutoModelForSeq2SeqLM"] = (
        "AutoModelForCausalLM"
    )
    output_layer: str | None = None
    pair_class: str | None = None
    prefix: str | None = None

    def class_of(self, model: ModelConfig) -> str:
        """Return the entry of `architectures` that a model is written with."""
        if model.has_head and self.prefix is not None:
            return class_of_head(self.prefix, model.head)
        return self.pair_class if model.add_binary_head and self.pair_class is not None else self.class_name

    def loading_class(self, name: object) -> str:
        """Return the class of transformers that loads a folder whose `architectures` has one entry, the name."""
        if isinstance(name, str) and self.prefix is not None and name in head_classes(self.prefix):
            return name
        return "AutoModelForPreTraining" if self.pair_class is not None and name == self.pair_class else self.auto_class

    def names_of(self, model: ModelConfig, *, renews_head: bool = False) -> OtherNames:
        """Return how the tensors of a model's folder may differ; a head that it has is not foreign to it.

        Args:
            model: What is made of the folder.
            renews_head: The model's head is a fresh one, even if the folder has one.
        """
        if not model.has_head:
            return replace(self.other_names, foreign_heads=()) if model.add_binary_head else self.other_names
        heads, foreign = names_of_head(model), (*self.other_names.foreign_heads, *self.other_names.heads, "lm_head.")
        own = () if renews_head else heads
        foreign = tuple(name for name in (*foreign, *(HEAD_NAMES if renews_head else ())) if name not in own)
        if "bert.pooler." in heads:
            foreign = tuple(name for name in foreign if name != "bert.pooler.")
        return replace(self.other_names, foreign_heads=foreign, heads=heads)


_QWEN_DEFAULTS: Mapping[str, object] = {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
_LLAMA_NAMES = OtherNames(endings={}, buffers=r".*rotary_emb\.inv_freq")
_BERT_NAMES = OtherNames(
    base="bert.",
    endings={"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"},
    buffers=r".*embeddings\.position_ids",
    foreign_heads=("bert.pooler.", "cls.seq_relationship."),
    heads=("cls.predictions.",),
)
_T5 = Family(
    model_type="t5",
    class_name="T5ForConditionalGeneration",
    codec=T5Config(),
    other_names=OtherNames(
        endings={}, buffers=r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight"
    ),
    other_classes=("T5WithLMHeadModel",),
    auto_class="AutoModelForSeq2SeqLM",
    output_layer="lm_head.weight",
)

FAMILIES: Mapping[str, Family] = {
    family.model_type: family
    for family in (
        Family(
            model_type="llama",
            class_name="LlamaForCausalLM",
            prefix="Llama",
            codec=LlamaConfig(
                changed_defaults={}, refused_flags=("attention_bias", "mlp_bias"), splits_hidden_size=True
            ),
            other_names=_LLAMA_NAMES,
        ),
        Family(
            model_type="mistral",
            class_name="MistralForCausalLM",
            prefix="Mistral",
            codec=LlamaConfig(
                changed_defaults={
                    "intermediate_size": 14336,
                    "num_key_value_heads": 8,
                    "max_position_embeddings": 131072,
                    "sliding_window": 4096,
                },
            ),
            other_names=_LLAMA_NAMES,
        ),
        Family(
            model_type="qwen2",
            class_name="Qwen2ForCausalLM",
            prefix="Qwen2",
            codec=LlamaConfig(changed_defaults=_QWEN_DEFAULTS),
            other_names=_LLAMA_NAMES,
        ),
        Family(
            model_type="qwen3",
            class_name="Qwen3ForCausalLM",
            prefix="Qwen3",
            codec=LlamaConfig(
                changed_defaults={**_QWEN_DEFAULTS, "head_dim": 128},
                refused_flags=("attention_bias",),
            ),
            other_names=_LLAMA_NAMES,
        ),
        Family(
            model_type="mixtral",
            class_name="MixtralForCausalLM",
            prefix="Mixtral",
            codec=MixtureConfig(
                changed_defaults={
                    "intermediate_size": 14336,
                    "num_key_value_heads": 8,
                    "max_position_embeddings": 131072,
                    "rms_norm_eps": 1e-5,
                    "rope_theta": 1e6,
                    "num_experts_per_tok": 2,
                },
                number_keys=("num_local_experts",),
                default_number=8,
            ),
            other_names=_LLAMA_NAMES,
        ),
        Family(
            model_type="qwen3_moe",
            class_name="Qwen3MoeForCausalLM",
            prefix="Qwen3Moe",
            codec=MixtureConfig(
                changed_defaults={
                    "vocab_size": 151936,
                    "hidden_size": 2048,
                    "intermediate_size": 6144,
                    "num_hidden_layers": 24,
                    "num_key_value_heads": 4,
                    "max_position_embeddings": 32768,
                    "sliding_window": 4096,
                    "use_sliding_window": False,
                    "num_experts_per_tok": 8,
                    "moe_intermediate_size": 768,
                    "norm_topk_prob": False,
                    "decoder_sparse_step": 1,
                },
                refused_flags=("attention_bias",),
                number_keys=("num_experts", "num_local_experts"),
                default_number=128,
                width_key="moe_intermediate_size",
                share_key="norm_topk_prob",
                dense_keys=("decoder_sparse_step", "mlp_only_layers"),
            ),
            other_names=_LLAMA_NAMES,
        ),
        Family(
            model_type="gpt2",
            class_name="GPT2LMHeadModel",
            prefix="GPT2",
            codec=Gpt2Config(),
            other_names=OtherNames(base="transformer.", endings={}, buffers=r".*\.attn\.(masked_)?bias"),
            other_classes=("GPT2Model",),
        ),
        Family(
            model_type="bert",
            class_name="BertForMaskedLM",
            prefix="Bert",
            codec=BertConfig(changed_defaults={}),
            other_names=_BERT_NAMES,
            other_classes=("BertModel", "BertForPreTraining"),
            pair_class="BertForPreTraining",
            auto_class="AutoModelForMaskedLM",
        ),
        Family(
            model_type="megatron-bert",
            class_name="MegatronBertForMaskedLM",
            prefix="MegatronBert",
            codec=BertConfig(
                changed_defaults={
                    "vocab_size": 29056,
                    "hidden_size": 1024,
                    "num_hidden_layers": 24,
                    "num_attention_heads": 16,
                    "intermediate_size": 4096,
                }
            ),
            other_names=_BERT_NAMES,
            other_classes=("MegatronBertModel", "MegatronBertForPreTraining"),
            pair_class="MegatronBertForPreTraining",
            auto_class="AutoModelForMaskedLM",
        ),
    )
} | {"t5": _T5, "t5-v1.0": _T5}
"""By architecture, a key of `config.architectures`, which is the `model_type` but for T5's first release."""
