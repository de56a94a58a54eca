"""A decoder as megatron-core builds it, with a true vocabulary size and a loss that needs no full logits."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region, gather_from_sequence_parallel_region
from torch import Tensor
from torch.nn import functional

from megatron_7b import upstream
from megatron_7b.config.schema import RopeScalingConfig
from megatron_7b.model.context_parallel import share_of
from megatron_7b.model.distillation import Taught, TaughtLosses, TopTaught, linear_distillation
from megatron_7b.model.fused_loss import linear_cross_entropy, linear_token_losses
from megatron_7b.model.kinds.chunk import ModelChunk, cast_learned_vectors
from megatron_7b.model.kinds.decoder.layers import build_stack_spec, hybrid_layer_pattern
from megatron_7b.model.kinds.decoder.parameters import core_name
from megatron_7b.model.kinds.kind import ChunkPlan
from megatron_7b.model.parameters import ParameterTable
from megatron_7b.model.pooling import Pooling, pooled_states
from megatron_7b.model.task_head import TaskHead, picked_states

_KEPT_AT_ONCE = 256
"""Tokens in whole multiples of which go through the output layer: tensors of a new size in every microbatch would leave
gaps in the memory of a process on a CPU, which then grows with every step."""


class LanguageModel(ModelChunk, HybridModel):
    """megatron-core's HybridModel with a true vocabulary size, returning the losses of tokens or their masked sum.

    Attributes:
        table: The parameters of the whole model, vocabulary padding included.
        true_vocab_size: Rows of the embedding that are tokens; the rest is padding and gets no probability.
        fuse_loss: Compute output layer and loss chunk by chunk, without holding all logits.
        label_smoothing: Share of each label that is spread over the vocabulary in training; needs the fused loss.
        task_head: On the last stage, what takes the place of the output layer.
    """

    def __init__(self, *, plan: ChunkPlan, fuse_loss: bool, label_smoothing: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.label_smoothing = label_smoothing
        self.table: ParameterTable = plan.table
        self.true_vocab_size = plan.vocab_size
        self.fuse_loss = fuse_loss
        self.task_head: TaskHead | None = None
        if plan.config.model.has_head and self.post_process:
            del self.output_layer
            self.task_head = TaskHead(plan)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        loss_mask: Tensor | None = None,
        by_token: bool = False,
        head_positions: Tensor | None = None,
        pooling: Pooling | None = None,
        wants_states: bool = False,
        taught: Taught | TopTaught | None = None,
        **kwargs: Any,
    ) -> Tensor | TaughtLosses:
        """Run this chunk.

        Args:
            input_ids: [b, s].
            position_ids: [b, s].
            attention_mask: None: attention is causal.
            labels: [b, s]; None asks for logits.
            loss_mask: [b, s]; needed with labels.
            by_token: Return the losses of the tokens one by one instead of their sum.
            head_positions: [n], the tokens, of b = 1, that a model with a head shall classify.
            pooling: Asks for the vectors of n texts that the tokens, of b = 1, consist of.
            wants_states: Return the last hidden states, [s, b, h] or [s/tp, b, h], whatever the labels are.
            taught: What a teacher says of the tokens: return what the mask keeps of its distance as well.
            kwargs: As megatron-core's HybridModel takes them.

        Returns:
            On a chunk that is not the last: hidden states [s, b, h]. On the last: FP32 sum of the token losses that the
            mask keeps, or `by_token` each times its mask, [b, s]; without labels the logits [b, s, v/tp]. With a head
            FP32 logits of its outputs, [n, labels]; with pooling FP32 vectors, [n, h].

        Collective: the tensor-parallel group.
        """
        if wants_states:
            return self._hidden_states(input_ids, position_ids, attention_mask, **kwargs)
        if pooling is not None:
            hidden = self._hidden_states(input_ids, position_ids, attention_mask, **kwargs)
            return self._pooled(hidden, pooling) if self.post_process else hidden
        if head_positions is not None:
            hidden = self._hidden_states(input_ids, position_ids, attention_mask, **kwargs)
            return hidden if self.task_head is None else self._classify(hidden, head_positions)
        if labels is None:
            logits: Tensor = super().forward(input_ids, position_ids, attention_mask, **kwargs)
            return logits
        assert loss_mask is not None
        if not self.fuse_loss and taught is None:
            output: Tensor = super().forward(input_ids, position_ids, attention_mask, labels=labels, **kwargs)
            if not self.post_process:
                return output
            losses = output.float() * loss_mask
            return losses if by_token else losses.sum()
        hidden = self._hidden_states(input_ids, position_ids, attention_mask, **kwargs)
        if not self.post_process:
            return hidden
        return self._fused_loss(hidden, labels, loss_mask, by_token=by_token, taught=taught)

    def _hidden_states(
        self, input_ids: Tensor, position_ids: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> Tensor:
        """Return the hidden states after this chunk's layers, [s, b, h] or [s/tp, b, h]."""
        embedded = self.embedding(input_ids=input_ids, position_ids=position_ids) if self.pre_process else None
        rotation = None
        if self.position_embedding_type == "rope":
            packed = kwargs.get("packed_seq_params")
            length = self.rotary_pos_emb.get_rotary_seq_len(None, self.decoder, embedded, self.config, packed)
            # For packed sequences it returns the angles of all positions, which we divide: it would use pinned memory.
            angles, group = self.rotary_pos_emb(length, packed_seq=True), self.pg_collection.cp
            rotation = share_of(angles, group.rank(), group.size(), dim=0)
        hidden: Tensor = self.decoder(embedded, attention_mask, rotary_pos_emb=rotation, **kwargs)
        return hidden

    def output_weight(self) -> Tensor:
        """Return this rank's rows of the output layer, [v/tp, h]; for the last stage."""
        tied = self.share_embeddings_and_output_weights
        weight: Tensor = self.shared_embedding_or_output_weight() if tied else self.output_layer.weight
        return weight

    def place_in_vocabulary(self) -> dict[str, Any]:
        """Return which tokens this rank's rows of the output layer are of, as the fused losses take it."""
        group = self.pg_collection.tp
        first_token = group.rank() * self.output_weight().shape[0]
        return {
            "first_token": first_token,
            "num_true": self.true_vocab_size - first_token,
            "group": group if group.size() > 1 else None,
        }

    def states_and_weight(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Return last hidden states, [n, h] on every tensor rank, and this rank's rows of the output layer.

        Collective: the tensor-parallel group, with sequence parallelism.
        """
        if self.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, group=self.pg_collection.tp)
        return hidden.flatten(0, 1), self.output_weight()

    def _pooled(self, hidden: Tensor, pooling: Pooling) -> Tensor:
        return pooled_states(
            hidden, pooling, sequence_parallel=self.config.sequence_parallel, group=self.pg_collection.tp
        )

    def _classify(self, hidden: Tensor, positions: Tensor) -> Tensor:
        assert self.task_head is not None
        is_divided, group = self.config.sequence_parallel, self.pg_collection.tp
        logits: Tensor = self.task_head(picked_states(hidden, positions, sequence_parallel=is_divided, group=group))
        return logits

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Describe this chunk's parameters to megatron-core's checkpoints, which know of no head."""
        if self.task_head is None:
            state: dict[str, Any] = super().sharded_state_dict(*args, **kwargs)
            return state
        return self.state_without_output_layer(*args, **kwargs)

    def _fused_loss(
        self, hidden: Tensor, labels: Tensor, loss_mask: Tensor, *, by_token: bool, taught: Taught | TopTaught | None
    ) -> Tensor | TaughtLosses:
        """Return the masked losses from the last hidden states, [s, b, h] or [s/tp, b, h]; their sum, or [b, s]."""
        group = self.pg_collection.tp
        if self.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, group=group)
        else:
            hidden = copy_to_tensor_model_parallel_region(hidden, group=group)
        # The output layer's forward is not called: with overlap_param_gather, its hooks wait for the updated weight.
        for wait in upstream.forward_pre_hooks(self.output_layer):
            wait(self.output_layer, ())
        weight = self.output_weight()
        states, targets, mask = hidden.flatten(0, 1), labels.t().flatten(), loss_mask.t().flatten()
        place = self.place_in_vocabulary()
        if taught is not None:
            if isinstance(taught, Taught):
                of_teacher = taught.hidden
                if self.config.sequence_parallel:
                    of_teacher = gather_from_sequence_parallel_region(of_teacher, group=group)
                taught = replace(taught, hidden=of_teacher.flatten(0, 1))
            return linear_distillation(states, weight, targets, mask, taught, **place)
        if not by_token:
            smoothing = self.label_smoothing if self.training else 0.0
            return linear_cross_entropy(states, weight, targets, mask, label_smoothing=smoothing, **place)
        kept = mask.nonzero().squeeze(1)  # only they go through the output layer
        if not len(kept):
            return states.sum() * mask.new_zeros(labels.shape)
        is_one = torch.ones(len(kept), device=mask.device)
        missing = -len(kept) % _KEPT_AT_ONCE
        kept, is_one = functional.pad(kept, (0, missing), value=int(kept[0])), functional.pad(is_one, (0, missing))
        losses = mask[kept] * is_one * linear_token_losses(states[kept], weight, targets[kept], **place)
        return mask.new_zeros(mask.shape).index_add(0, kept, losses).view(labels.shape[::-1]).t()

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Return the cross entropy of each token over the true vocabulary.

        Args:
            labels: [b, s].
            logits: [s, b, v/tp].

        Returns:
            [b, s].
        """
        self.mask_vocabulary_padding(logits, vocab_dim_start=self.pg_collection.tp.rank() * logits.shape[-1])
        losses: Tensor = super().compute_language_model_loss(labels, logits)
        return losses

    def mask_vocabulary_padding(self, logits: Tensor, *, vocab_dim_start: int = 0) -> None:
        """Set the logits of padded rows so low, in place, that they get no probability.

        Args:
            logits: [..., v/tp]: columns [vocab_dim_start, vocab_dim_start + v/tp) of the padded vocabulary.
            vocab_dim_start: Vocabulary index of the first column.
        """
        num_true = self.true_vocab_size - vocab_dim_start
        if num_true < logits.shape[-1]:
            logits[..., max(0, num_true) :] = torch.finfo(logits.dtype).min

    def named_core_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """Yield the parameters of this chunk under megatron-core's names in the whole model.

        On the last of several stages, the output layer of a tied model is a copy of the embedding and has its name.
        """
        layers = self.decoder.layers
        offset = layers[0].layer_number - 1 if len(layers) else 0
        experts = self.pg_collection.ep.rank() * (self.config.num_moe_experts or 0) // self.pg_collection.ep.size()
        for local_name, parameter in self.named_parameters():
            name = core_name(local_name, layer_offset=offset, expert_offset=experts)
            if name == "output_layer.weight" and self.share_embeddings_and_output_weights:
                name = "embedding.word_embeddings.weight"
            yield name, parameter


def build_chunk(plan: ChunkPlan) -> LanguageModel:
    """Build one model chunk of this rank; its parameters are undefined. Collective: none."""
    model = plan.config.model
    cross_entropy = plan.config.cross_entropy_impl(has_transformer_engine=plan.impl == "transformer_engine")
    with upstream.final_norm(plan.kernels.norm):
        chunk = LanguageModel(
            plan=plan,
            fuse_loss=cross_entropy == "chunked",
            label_smoothing=plan.config.finetune.label_smoothing,
            config=plan.core_config,
            hybrid_stack_spec=build_stack_spec(plan.kernels, qk_layernorm=model.qk_layernorm),
            vocab_size=plan.padded_vocab_size,
            max_sequence_length=model.max_position_embeddings,
            hybrid_layer_pattern=hybrid_layer_pattern(model, plan.config.parallel.stage_layers(model.num_layers)),
            pre_process=plan.is_first,
            post_process=plan.is_last,
            share_embeddings_and_output_weights=model.share_embeddings_and_output_weights and not model.has_head,
            position_embedding_type=model.traits.position_embedding_type,
            rotary_base=model.rotary_base,
            pg_collection=plan.groups,
            vp_stage=plan.stage if plan.layout.num_chunks > 1 else None,
        )
    if chunk.pre_process:
        cast_learned_vectors(chunk.embedding)
    if model.rope_scaling is not None:
        _stretch_rotary_embedding(chunk.rotary_pos_emb, model.rope_scaling)
    if plan.impl == "transformer_engine":
        _fuse_gradient_accumulation(chunk)
    return chunk


def _fuse_gradient_accumulation(chunk: LanguageModel) -> None:
    """Have Transformer Engine's layers add weight gradients to the gradient buffer within the matrix product.

    megatron-core 0.19 ties this to the option that has its own output layer ask for apex, which need not be there.
    """
    for module in chunk.modules():
        if hasattr(module, "fuse_wgrad_accumulation"):
            module.fuse_wgrad_accumulation = True


def _stretch_rotary_embedding(rotary: RotaryEmbedding, scaling: RopeScalingConfig) -> None:
    """Apply Llama 3.1's scaling, which HybridModel's constructor does not support."""
    rotary.inv_freq = upstream.stretched_frequencies(
        rotary,
        factor=scaling.factor,
        low_freq_factor=scaling.low_freq_factor,
        high_freq_factor=scaling.high_freq_factor,
        original_max_position_embeddings=scaling.original_max_position_embeddings,
    )
