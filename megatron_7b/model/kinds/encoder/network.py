"""An encoder on megatron-core's layers: BERT with its heads, or Megatron's variant with the norms first.

The rows of a microbatch are one long row of sentences, told apart as packed documents (`packed_seq_params`), so padding
costs no attention, and is a sentence of its own that nothing reads.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor
from torch.nn import functional

from megatron_7b import upstream
from megatron_7b.model.distillation import Taught, TaughtLosses, linear_distillation
from megatron_7b.model.fused_loss import linear_cross_entropy
from megatron_7b.model.kinds.chunk import ModelChunk, cast_learned_vectors
from megatron_7b.model.kinds.encoder.layers import build_block_spec
from megatron_7b.model.kinds.kind import ChunkPlan
from megatron_7b.model.pooling import Pooling, pooled_states
from megatron_7b.model.task_head import TaskHead, picked_states

_FUSED_NORMS = (
    (".self_attention.linear_qkv.layer_norm_", ".input_layernorm."),
    (".mlp.linear_fc1.layer_norm_", ".pre_mlp_layernorm."),
)


class EncoderOutput(NamedTuple):
    """What the last stage computes of a microbatch with labels."""

    masked: Tensor
    """FP32 sum of the losses of hidden tokens."""
    word_before: Tensor | None
    """The same of visible words before them; None if they are not asked for."""
    pairs: Tensor | None
    """FP32 logits of the two classes of each row, [b, 2]; None without pairs."""
    taught: TaughtLosses | None = None
    """Of all these tokens, where a teacher has spoken: its `loss` alone has a gradient, `masked` and `word_before` have
    none."""


class EncoderModel(ModelChunk, LanguageModule):
    """One pipeline stage of an encoder.

    Args:
        plan: What it is built from.
    """

    def __init__(self, plan: ChunkPlan) -> None:
        super().__init__(config=plan.core_config, pg_collection=plan.groups)
        model, config = plan.config.model, plan.core_config
        is_post_norm = model.traits.norm_placement == "post"
        self.table = plan.table
        self.true_vocab_size = plan.vocab_size
        self.pre_process, self.post_process = plan.is_first, plan.is_last
        self.vp_stage = plan.stage if plan.layout.num_chunks > 1 else None
        self.share_embeddings_and_output_weights = model.share_embeddings_and_output_weights and not model.has_head
        self.model_type = ModelType.encoder_or_decoder

        def build_norm() -> torch.nn.Module:
            norm: torch.nn.Module = plan.kernels.norm(
                config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon
            )
            return norm

        if self.pre_process:
            self.embedding = LanguageModelEmbedding(
                config=config,
                vocab_size=plan.padded_vocab_size,
                max_sequence_length=model.max_position_embeddings,
                position_embedding_type="learned_absolute",
                num_tokentypes=model.num_tokentypes,
                tp_group=plan.groups.tp,
            )
            cast_learned_vectors(self.embedding)
            if is_post_norm:
                dropout = self.embedding.embedding_dropout
                self.embedding.embedding_dropout = torch.nn.Sequential(build_norm(), dropout)
        num_layers = model.num_layers // (plan.layout.pp_size * plan.layout.num_chunks)
        self.encoder = TransformerBlock(
            config=config,
            spec=build_block_spec(plan.kernels, num_layers=num_layers, is_post_norm=is_post_norm),
            pre_process=self.pre_process,
            post_process=self.post_process,
            post_layer_norm=not is_post_norm,
            pg_collection=plan.groups,
            vp_stage=self.vp_stage,
        )
        self.task_head: TaskHead | None = None
        if self.post_process and model.has_head:
            self._build_task_head(plan)
        elif self.post_process:
            self._build_heads(plan, build_norm())
            if model.add_binary_head:
                self._build_pair_head(plan)
        if self.pre_process or self.post_process:
            self.setup_embeddings_and_output_layer()

    def _build_heads(self, plan: ChunkPlan, norm: torch.nn.Module) -> None:
        hidden, dtype = plan.core_config.hidden_size, plan.core_config.params_dtype
        self.lm_head = torch.nn.Linear(hidden, hidden, dtype=dtype)
        self.lm_norm = norm
        for parameter in self.lm_norm.parameters():
            parameter.sequence_parallel = False  # type: ignore[attr-defined]  # it gets whole rows
        self.output_layer = ColumnParallelLinear(
            hidden,
            plan.padded_vocab_size,
            config=plan.core_config,
            init_method=plan.core_config.init_method,
            bias=True,
            skip_weight_param_allocation=self.pre_process and self.share_embeddings_and_output_weights,
            tp_group=plan.groups.tp,
        )

    def _build_task_head(self, plan: ChunkPlan) -> None:
        hidden, dtype = plan.core_config.hidden_size, plan.core_config.params_dtype
        self.task_head = TaskHead(plan)
        if plan.config.model.head == "sequence_classification":
            self.pooler = torch.nn.Linear(hidden, hidden, dtype=dtype)

    def _build_pair_head(self, plan: ChunkPlan) -> None:
        hidden, dtype = plan.core_config.hidden_size, plan.core_config.params_dtype
        self.pooler = torch.nn.Linear(hidden, hidden, dtype=dtype)
        self.binary_head = torch.nn.Linear(hidden, 2, dtype=dtype)
        if plan.config.objective.sentence_pairs == "none":
            # It came with the weights, and nothing trains it: it stays as it is, without decay.
            self.pooler.requires_grad_(False)
            self.binary_head.requires_grad_(False)

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor]) -> None:
        """Take the hidden states of the stage before; called by megatron-core's schedules."""
        tensor = input_tensor[0] if isinstance(input_tensor, list) else input_tensor
        self.encoder.set_input_tensor(tensor)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        *,
        packed_seq_params: PackedSeqParams,
        tokentype_ids: Tensor | None = None,
        labels: Tensor | None = None,
        loss_mask: Tensor | None = None,
        is_word_before: Tensor | None = None,
        pair_labels: Tensor | None = None,
        head_positions: Tensor | None = None,
        pooling: Pooling | None = None,
        wants_states: bool = False,
        taught: Taught | None = None,
    ) -> Tensor | EncoderOutput | tuple[Tensor, Tensor]:
        """Run this stage over t tokens of several sentences.

        Args:
            input_ids: [1, t].
            position_ids: [1, t], counted from the beginning of each sentence.
            packed_seq_params: Where sentences begin, in the thd format.
            tokentype_ids: [1, t]; needed if the model has embeddings for them.
            labels: [1, t]; None asks for logits.
            loss_mask: [1, t]; needed with labels.
            is_word_before: [1, t]; which of the tokens that the mask keeps are summed apart.
            pair_labels: [b], one for each of b rows of equal length that the t tokens consist of: asks for the classes
                of their pairs, which the caller compares with them.
            head_positions: [n], the tokens that a model with a head shall classify: each text's first one, or any.
            pooling: Asks for the vectors of n texts that the tokens consist of.
            wants_states: Return what the output layer takes of the tokens that the mask keeps, [n, h].
            taught: What a teacher says of these tokens.

        Returns:
            On a stage that is not the last: hidden states [t, 1, h]. On the last: the losses of the tokens that the
            mask keeps; or without labels the logits [1, t, v/tp], with `pair_labels` those of pairs beside them;
            with a head FP32 logits of its outputs, [n, labels]; with pooling FP32 vectors, [n, h].

        Collective: the tensor-parallel group.
        """
        embedded = None
        if self.pre_process:
            if self.embedding.num_tokentypes and tokentype_ids is None:
                tokentype_ids = torch.zeros_like(input_ids)
            embedded = self.embedding(input_ids, position_ids, tokentype_ids if self.embedding.num_tokentypes else None)
        hidden: Tensor = self.encoder(embedded, attention_mask=None, packed_seq_params=packed_seq_params)
        if not self.post_process:
            return hidden
        if pooling is not None:
            is_divided, group = self.config.sequence_parallel, self.pg_collection.tp
            return pooled_states(hidden, pooling, sequence_parallel=is_divided, group=group)
        if self.task_head is not None:
            assert head_positions is not None
            return self._head_logits(hidden, head_positions)
        hidden = self._whole_rows(hidden)
        if wants_states:
            assert loss_mask is not None
            return self._transformed(hidden.flatten(0, 1)[loss_mask.flatten().nonzero().squeeze(1)])
        pairs = None if pair_labels is None else self._classify(hidden.view(len(pair_labels), -1, hidden.shape[-1]))
        if labels is None:
            logits = self._logits(hidden).transpose(0, 1)
            return logits if pairs is None else (logits, pairs)
        assert loss_mask is not None
        return self._losses(hidden.flatten(0, 1), labels, loss_mask, is_word_before, pairs, taught)

    def _head_logits(self, hidden: Tensor, positions: Tensor) -> Tensor:
        assert self.task_head is not None
        is_divided, group = self.config.sequence_parallel, self.pg_collection.tp
        states = picked_states(hidden, positions, sequence_parallel=is_divided, group=group)
        if hasattr(self, "pooler"):
            states = torch.tanh(self.pooler(states))
        logits: Tensor = self.task_head(states)
        return logits

    def _classify(self, rows: Tensor) -> Tensor:
        """Return FP32 logits of the two classes of pairs, [b, 2], from the first token of each of [b, s, h]."""
        pooled = torch.tanh(self.pooler(rows[:, 0]))
        logits: Tensor = self.binary_head(pooled).float()
        return logits

    def _whole_rows(self, hidden: Tensor) -> Tensor:
        """Return [t, 1, h] on every tensor rank; the heads are computed by each of them."""
        if not self.config.sequence_parallel:
            return hidden
        group = self.pg_collection.tp
        whole: Tensor = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False, group=group)
        return whole

    def _transformed(self, hidden: Tensor) -> Tensor:
        """Apply the head before the output layer, [..., h]; its gradient is summed over the tensor ranks."""
        transformed = self.lm_norm(functional.gelu(self.lm_head(hidden)))
        copied: Tensor = copy_to_tensor_model_parallel_region(transformed, group=self.pg_collection.tp)
        return copied

    def output_weight(self) -> Tensor:
        """Return this rank's rows of the output layer, [v/tp, h]; for the last stage."""
        tied = self.share_embeddings_and_output_weights
        weight: Tensor = self.shared_embedding_or_output_weight() if tied else self.output_layer.weight
        return weight

    def _logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self._transformed(hidden) @ self.output_weight().t() + self.output_layer.bias
        first = self.pg_collection.tp.rank() * logits.shape[-1]
        logits[..., max(0, self.true_vocab_size - first) :] = torch.finfo(logits.dtype).min
        return logits

    def _losses(
        self,
        hidden: Tensor,
        labels: Tensor,
        loss_mask: Tensor,
        is_word_before: Tensor | None,
        pairs: Tensor | None,
        taught: Taught | None,
    ) -> EncoderOutput:
        """Return the losses of the tokens that the mask keeps, from last hidden states [t, h]."""
        kept, labels, weights = loss_mask.flatten().nonzero().squeeze(1), labels.flatten(), loss_mask.flatten()

        def of_some(chosen: Tensor) -> Tensor | TaughtLosses:
            places, told = kept[chosen], None if taught is None else replace(taught, hidden=taught.hidden[chosen])
            return self._loss_sum(hidden[places], labels[places], weights[places], told)

        is_before = kept < 0 if is_word_before is None else is_word_before.flatten()[kept]
        masked, before = of_some(~is_before), None if is_word_before is None else of_some(is_before)
        if not isinstance(masked, TaughtLosses):
            assert not isinstance(before, TaughtLosses)
            return EncoderOutput(masked, before, pairs)
        if before is None:
            return EncoderOutput(masked.task, None, pairs, masked)
        assert isinstance(before, TaughtLosses)
        both = TaughtLosses(*(one + other for one, other in zip(masked, before, strict=True)))
        return EncoderOutput(masked.task, before.task, pairs, both)

    def _loss_sum(
        self, hidden: Tensor, labels: Tensor, weights: Tensor, taught: Taught | None
    ) -> Tensor | TaughtLosses:
        """Return the sum of the losses of tokens that are kept; only they go through head and output layer."""
        # The output layer's forward is not called: with overlap_param_gather, its hooks wait for the updated weight.
        for wait in upstream.forward_pre_hooks(self.output_layer):
            wait(self.output_layer, ())
        group, weight, bias = self.pg_collection.tp, self.output_weight(), self.output_layer.bias
        states, first_token = self._transformed(hidden), group.rank() * weight.shape[0]
        place = {
            "first_token": first_token,
            "num_true": self.true_vocab_size - first_token,
            "group": group if group.size() > 1 else None,
        }
        if taught is not None:
            return linear_distillation(states, weight, labels, weights, taught, bias=bias, **place)
        return linear_cross_entropy(states, weight, labels, weights, bias=bias, **place)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Describe this stage's parameters to megatron-core's checkpoints, each layer's under a name of its own."""
        metadata = {**(metadata or {}), "non_homogeneous_layers": True}
        if self.task_head is not None:
            return self.state_without_output_layer(prefix, sharded_offsets, metadata)
        state: dict[str, Any] = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        return state

    def named_core_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """Yield the parameters of this chunk under their names in the whole model."""
        offset = self.encoder.layers[0].layer_number - 1 if len(self.encoder.layers) else 0
        for name, parameter in self.named_parameters():
            for fused, own in _FUSED_NORMS:
                name = name.replace(fused, own)
            if name == "output_layer.weight" and self.share_embeddings_and_output_weights:
                name = "embedding.word_embeddings.weight"
            yield re.sub(r"(?<=^encoder\.layers\.)\d+", lambda match: str(int(match.group()) + offset), name), parameter


def build_chunk(plan: ChunkPlan) -> EncoderModel:
    """Build one model chunk of this rank; its parameters are undefined. Collective: the embedding group."""
    return EncoderModel(plan)
