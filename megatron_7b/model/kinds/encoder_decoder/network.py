"""An encoder-decoder on megatron-core's layers: T5, without pipeline stages.

The encoder may run once and the decoder as often as needed: `encode`, `decode` and `logits` are the parts of `forward`.
"""

import contextlib
import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    get_cuda_rng_tracker,
)
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor
from torch.nn import functional

from megatron_7b import upstream
from megatron_7b.model.fused_loss import linear_cross_entropy
from megatron_7b.model.kinds.chunk import ModelChunk
from megatron_7b.model.kinds.encoder_decoder.layers import FUSED_NORMS, build_block_spec
from megatron_7b.model.kinds.encoder_decoder.relative_bias import RelativePositionBias, share_bias
from megatron_7b.model.kinds.kind import ChunkPlan


class EncoderDecoderModel(ModelChunk, LanguageModule):
    """The whole model, or a tensor rank's share of it.

    Under sequence parallelism the lengths of text and answer must be multiples of the tensor-parallel size.

    Args:
        plan: What it is built from.
    """

    def __init__(self, plan: ChunkPlan) -> None:
        super().__init__(config=plan.core_config, pg_collection=plan.groups)
        assert plan.is_first, "an encoder-decoder has one stage"
        assert plan.is_last, "an encoder-decoder has one stage"
        model, config = plan.config.model, plan.core_config
        self.table = plan.table
        self.true_vocab_size = plan.vocab_size
        self.label_smoothing = plan.config.finetune.label_smoothing
        self.pre_process = self.post_process = True
        self.vp_stage = None
        self.share_embeddings_and_output_weights = model.share_embeddings_and_output_weights
        self.model_type = ModelType.encoder_or_decoder
        self.output_scale = model.hidden_size**-0.5 if model.scale_output_states else 1.0
        self.embedding = LanguageModelEmbedding(
            config=config,
            vocab_size=plan.padded_vocab_size,
            max_sequence_length=model.max_position_embeddings,
            position_embedding_type="relative",  # nothing is added for positions
            tp_group=plan.groups.tp,
        )
        self.encoder_relative_pos_emb, self.decoder_relative_pos_emb = (
            RelativePositionBias(
                config,
                num_buckets=model.relative_attention_num_buckets,
                max_distance=model.relative_attention_max_distance,
                is_bidirectional=is_bidirectional,
                tp_group=plan.groups.tp,
            )
            for is_bidirectional in (True, False)
        )
        self.encoder = _build_stack(plan, model.num_layers, is_decoder=False)
        self.decoder = _build_stack(plan, model.decoder_layers, is_decoder=True)
        self.output_layer = ColumnParallelLinear(
            config.hidden_size,
            plan.padded_vocab_size,
            config=config,
            init_method=config.init_method,
            bias=False,
            skip_weight_param_allocation=self.share_embeddings_and_output_weights,
            tp_group=plan.groups.tp,
        )
        self.setup_embeddings_and_output_layer()

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor]) -> None:
        """Take nothing: there is no stage before; called by megatron-core's schedules."""

    def forward(
        self,
        input_ids: Tensor,
        decoder_input_ids: Tensor,
        *,
        attention_mask: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        loss_mask: Tensor | None = None,
    ) -> Tensor:
        """Read texts and predict answers.

        Args:
            input_ids: Texts, [b, s].
            decoder_input_ids: Answers after their start token, [b, s_d].
            attention_mask: False where a text is padding, [b, s]; None: nowhere.
            decoder_attention_mask: The same for answers, [b, s_d]; not needed if padding follows them.
            labels: [b, s_d]; None asks for logits.
            loss_mask: [b, s_d]; needed with labels.

        Returns:
            FP32 sum of the losses of the tokens that the mask keeps, or without labels the logits [b, s_d, v/tp].

        Collective: the tensor-parallel group.
        """
        states = self.encode(input_ids, attention_mask)
        hidden = self.decode(decoder_input_ids, states, attention_mask, decoder_attention_mask)
        if labels is None:
            return self.logits(hidden).transpose(0, 1)
        assert loss_mask is not None
        return self._loss_sum(hidden, labels, loss_mask)

    def encode(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Return what the decoder attends to of texts.

        Args:
            input_ids: [b, s].
            attention_mask: False where a text is padding, [b, s]; None: nowhere.

        Returns:
            [s, b, h], or [s/tp, b, h] under sequence parallelism.

        Collective: the tensor-parallel group.
        """
        bias = self.encoder_relative_pos_emb(input_ids.shape[1], input_ids.shape[1])
        return self._run(self.encoder, input_ids, _hide_padding(bias, attention_mask))

    def decode(
        self,
        decoder_input_ids: Tensor,
        encoder_states: Tensor,
        attention_mask: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        *,
        attention_bias: Tensor | None = None,
    ) -> Tensor:
        """Return the last hidden states of answers.

        Args:
            decoder_input_ids: [b, s_d].
            encoder_states: From `encode`, of the texts in the same order.
            attention_mask: False where a text is padding, [b, s]; None: nowhere.
            decoder_attention_mask: False where an answer is padding, [b, s_d]; None: nowhere.
            attention_bias: What self-attention adds to its scores, broadcast to [b, n/tp, s_d, s_k], very low where a
                key is hidden, if a cache holds further keys; None: that of these tokens, each seeing those before it.

        Returns:
            [s_d, b, h], or [s_d/tp, b, h] under sequence parallelism.

        Collective: the tensor-parallel group.
        """
        if attention_bias is None:
            length = decoder_input_ids.shape[1]
            later = torch.ones(length, length, dtype=torch.bool, device=decoder_input_ids.device).triu(1)
            bias = self.decoder_relative_pos_emb(length, length)
            attention_bias = _hide_padding(bias.masked_fill(later, _lowest(bias)), decoder_attention_mask)
        context_mask = None if attention_mask is None else attention_mask[:, None, None]
        return self._run(
            self.decoder, decoder_input_ids, attention_bias, context=encoder_states, context_mask=context_mask
        )

    def logits(self, hidden: Tensor) -> Tensor:
        """Apply the output layer to the last hidden states, [s_d, b, h] or [s_d/tp, b, h].

        Returns:
            [s_d, b, v/tp]; what is no token has the lowest number there is.

        Collective: the tensor-parallel group.
        """
        logits: Tensor = self.output_layer(hidden * self.output_scale, weight=self._output_weight())[0]
        first = self.pg_collection.tp.rank() * logits.shape[-1]
        logits[..., max(0, self.true_vocab_size - first) :] = _lowest(logits)
        return logits

    def _run(self, stack: TransformerBlock, ids: Tensor, attention_bias: Tensor, **context: Tensor | None) -> Tensor:
        """Return the hidden states after a stack and its norm."""
        embedded, bias = share_bias(self.embedding(ids, None), attention_bias)
        hidden: Tensor = stack(embedded, attention_mask=None, attention_bias=bias, **context)
        if not self.training or self.config.hidden_dropout == 0.0:
            return hidden
        is_shared = self.config.sequence_parallel  # then each tensor rank has tokens of its own
        with get_cuda_rng_tracker().fork() if is_shared else contextlib.nullcontext():
            return functional.dropout(hidden, self.config.hidden_dropout)

    def _output_weight(self) -> Tensor:
        tied = self.share_embeddings_and_output_weights
        weight: Tensor = self.shared_embedding_or_output_weight() if tied else self.output_layer.weight
        return weight

    def _loss_sum(self, hidden: Tensor, labels: Tensor, loss_mask: Tensor) -> Tensor:
        """Return the masked sum of losses from the last hidden states, [s_d, b, h] or [s_d/tp, b, h]."""
        group = self.pg_collection.tp
        if self.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, group=group)
        else:
            hidden = copy_to_tensor_model_parallel_region(hidden, group=group)
        # The output layer's forward is not called: with overlap_param_gather, its hooks wait for the updated weight.
        for wait in upstream.forward_pre_hooks(self.output_layer):
            wait(self.output_layer, ())
        weight = self._output_weight()
        first_token = group.rank() * weight.shape[0]
        return linear_cross_entropy(
            hidden.flatten(0, 1) * self.output_scale,
            weight,
            labels.t().flatten(),
            loss_mask.t().flatten(),
            first_token=first_token,
            num_true=self.true_vocab_size - first_token,
            group=group if group.size() > 1 else None,
            label_smoothing=self.label_smoothing if self.training else 0.0,
        )

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Describe the parameters to megatron-core's checkpoints, each layer's under a name of its own."""
        state: dict[str, Any] = super().sharded_state_dict(
            prefix, sharded_offsets, {**(metadata or {}), "non_homogeneous_layers": True}
        )
        return state

    def named_core_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """Yield the parameters under their names in the table."""
        for name, parameter in self.named_parameters():
            for fused, own in FUSED_NORMS.items():
                name = name.replace(fused, own)
            yield name, parameter


def _build_stack(plan: ChunkPlan, num_layers: int, *, is_decoder: bool) -> TransformerBlock:
    config = copy.copy(plan.core_config)
    config.num_layers = num_layers
    return TransformerBlock(
        config=config,
        spec=build_block_spec(plan.kernels, num_layers=num_layers, is_decoder=is_decoder),
        pg_collection=plan.groups,
    )


def _hide_padding(bias: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Hide the keys that are padding, [b, s_k], from all queries of a bias [1, n/tp, s, s_k]."""
    if attention_mask is None:
        return bias
    return bias.masked_fill(~attention_mask[:, None, None], _lowest(bias))


def _lowest(tensor: Tensor) -> float:
    """Return the lowest finite number: a query that sees nothing, as one of padding may, must not give NaN."""
    return torch.finfo(tensor.dtype).min


def build_chunk(plan: ChunkPlan) -> EncoderDecoderModel:
    """Build the model of this rank; its parameters are undefined. Collective: none."""
    return EncoderDecoderModel(plan)
