"""The section `model` of a run: the architecture and shape of a transformer. Nothing here imports torch."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal

from megatron_7b.config.architectures import ARCHITECTURES, Architecture
from megatron_7b.config.one_of import OneOf


@dataclass(frozen=True, kw_only=True)
class RopeScalingConfig:
    """Llama 3.1's frequency-dependent stretching of the rotary embedding."""

    factor: float = 8.0
    """Factor by which low frequencies are slowed."""
    low_freq_factor: float = 1.0
    """Wavelengths longer than the original context divided by this are slowed by the full factor."""
    high_freq_factor: float = 4.0
    """Wavelengths shorter than the original context divided by this stay as they are."""
    original_max_position_embeddings: int = 8192
    """Context length of the original pre-training, before stretching."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Architecture and shape of a transformer."""

    architecture: Annotated[str, OneOf(ARCHITECTURES)] = "llama"
    """Hugging Face architecture: what is built, and what exports are written as."""
    num_layers: int = 4
    """Transformer layers, each consisting of attention and an MLP."""
    num_decoder_layers: int | None = None
    """Layers of an encoder-decoder's decoder, beside num_layers of its encoder; None means as many."""
    hidden_size: int = 256
    """Width of the residual stream."""
    ffn_hidden_size: int = 688
    """Inner width of the MLP, between its (gated) up and down projections."""
    num_attention_heads: int = 8
    """Query heads."""
    num_query_groups: int | None = None
    """Key-value heads; None means one per query head."""
    kv_channels: int | None = None
    """Width of one head; None means hidden_size / num_attention_heads."""
    vocab_size: int | None = None
    """True vocabulary size, without padding; None means that of the tokenizer."""
    make_vocab_size_divisible_by: int = 128
    """Embedding rows are padded to a multiple of this (and of the tensor-parallel size)."""
    max_position_embeddings: int = 2048
    """Longest context: upper bound of data.seq_length, and written into exports."""
    window_size: int | None = None
    """Tokens that attention sees, the newest included (Hugging Face's sliding_window); None: all that came before."""
    window_attn_skip_freq: tuple[int, ...] = ()
    """Layers that see everything in spite of window_size: N means every N-th layer; or a number for each layer, 1 with
    a window and 0 without; if left out, all layers have a window."""
    rotary_base: float = 10000.0
    """Base of the rotary frequencies (rope_theta)."""
    rope_scaling: RopeScalingConfig | None = None
    relative_attention_num_buckets: int = 32
    """Distances that T5 tells apart, half of them exactly."""
    relative_attention_max_distance: int = 128
    """Distance from which on all are alike to T5."""
    norm_epsilon: float = 1e-5
    """Added to the mean square in RMSNorm."""
    share_embeddings_and_output_weights: bool = False
    """Use the word embeddings as the output layer (tied weights)."""
    scale_output_states: bool = False
    """Divide the last hidden states by sqrt(hidden_size) before the output layer (T5 with tied weights)."""
    add_qkv_bias: bool = False
    """Biases on the query, key and value projections (Qwen2)."""
    qk_layernorm: bool = False
    """RMSNorm on queries and keys, per head (Qwen3)."""
    num_moe_experts: int | None = None
    """MLPs of a layer of a mixture of experts (Mixtral, Qwen3-MoE), of which each token uses a few."""
    moe_router_topk: int = 2
    """Experts that each token uses."""
    moe_ffn_hidden_size: int | None = None
    """Inner width of an expert; None means ffn_hidden_size."""
    moe_router_pre_softmax: bool = False
    """Weigh experts by their share among all of them; otherwise among those that the token uses, adding up to 1."""
    moe_aux_loss_coeff: float = 0.0
    """Weight of the loss by which tokens spread over experts evenly; 0: there is none."""
    num_tokentypes: int = 0
    """Embeddings that tell the sentences of a pair apart (BERT: 2); 0: there are none."""
    add_binary_head: bool = False
    """BERT's pooler and its two classes for a pair of sentences; if left out, as objective.sentence_pairs needs it."""
    head: Literal["none", "sequence_classification", "token_classification", "question_answering"] = "none"
    """What takes the place of the output layer: a classifier of texts or of tokens, or the borders of answers."""
    num_labels: int = 2
    """Outputs of the head: one for each class; 1 for regression, 2 for question answering (first and last token)."""
    labels: tuple[str, ...] = ()
    """Names of the classes, in the order of the outputs; fine-tuning finds them in its data."""
    problem_type: Literal["single_label_classification", "multi_label_classification", "regression"] = (
        "single_label_classification"
    )
    """What a text has of the classes: exactly one, any number of them, or numbers in their place."""
    hidden_dropout: float = 0.0
    """Dropout on the outputs of attention and MLP, and before a head."""
    attention_dropout: float = 0.0
    """Dropout on the attention probabilities."""
    init_method_std: float = 0.02
    """Standard deviation of the initial weights; for output projections it is divided by sqrt(2 * num_layers)."""
    transformer_impl: Literal["auto", "transformer_engine", "local"] = "auto"
    """Layer kernels: Transformer Engine, torch-native, or the best that this machine supports."""

    @property
    def has_head(self) -> bool:
        """Whether a head takes the place of the output layer."""
        return self.head != "none"

    @property
    def traits(self) -> Architecture:
        """What follows from the name of the architecture."""
        return ARCHITECTURES[self.architecture]

    @property
    def head_width(self) -> int:
        """Channels `d` of one attention head."""
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def query_groups(self) -> int:
        """Key-value heads `g`."""
        return self.num_query_groups or self.num_attention_heads

    @property
    def layer_windows(self) -> tuple[int | None, ...]:
        """Of each layer, the tokens that its attention sees; None: all that came before."""
        given, numbers = self.window_attn_skip_freq, range(1, self.num_layers + 1)
        if self.window_size is None:
            return (None,) * self.num_layers
        if len(given) == 1:
            return tuple(None if number % given[0] == 0 else self.window_size for number in numbers)
        return tuple(self.window_size if not given or given[number - 1] else None for number in numbers)

    @property
    def expert_width(self) -> int:
        """Inner width of an expert."""
        return self.moe_ffn_hidden_size or self.ffn_hidden_size

    @property
    def decoder_layers(self) -> int:
        """Layers of an encoder-decoder's decoder."""
        return self.num_decoder_layers or self.num_layers


def with_layer_windows(model: ModelConfig, windows: Sequence[int | None]) -> ModelConfig:
    """Return a model whose `layer_windows` are the given ones, which differ in nothing but whether there is one."""
    sizes = {window for window in windows if window is not None}
    assert len(sizes) <= 1
    is_mixed = bool(sizes) and None in windows
    return replace(
        model,
        window_size=next(iter(sizes), None),
        window_attn_skip_freq=tuple(int(window is not None) for window in windows) if is_mixed else (),
    )
