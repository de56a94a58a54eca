"""A kind of model from outside the package: the next token from the last one alone, by two tables."""

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.transformer.enums import ModelType
from torch import Tensor
from torch.nn import functional

from megatron_7b.config.architectures import ARCHITECTURES, Architecture
from megatron_7b.config.objectives import OBJECTIVES
from megatron_7b.config.schema import ModelConfig
from megatron_7b.model.kinds import KINDS
from megatron_7b.model.kinds.chunk import ModelChunk
from megatron_7b.model.kinds.kind import ChunkPlan
from megatron_7b.model.parameters import Parameter


class BigramModel(ModelChunk):
    """Both tables, whole on every rank."""

    model_type = ModelType.encoder_or_decoder

    def __init__(self, plan: ChunkPlan) -> None:
        super().__init__(config=plan.core_config)
        shape = (plan.padded_vocab_size, plan.config.model.hidden_size)
        self.table = plan.table
        self.before = torch.nn.Parameter(torch.empty(shape, dtype=plan.core_config.params_dtype))
        self.after = torch.nn.Parameter(torch.empty(shape, dtype=plan.core_config.params_dtype))

    def set_input_tensor(self, input_tensor: Any) -> None:
        """There is one stage."""

    def forward(self, input_ids: Tensor, labels: Tensor, loss_mask: Tensor, **_positions: Tensor) -> Tensor:
        logits = self.before[input_ids] @ self.after.t()
        losses = functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="none")
        return (losses * loss_mask.flatten()).sum()

    def named_core_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        yield from self.named_parameters()


class Bigram:
    core_layers_per_layer = 1
    attended_positions = staticmethod(lambda *_sizes: 0.0)

    def parameters(self, model: ModelConfig, vocab_size: int) -> Iterator[Parameter]:
        for name in ("before", "after"):
            yield Parameter(name=name, core_name=name, hugging_face=(name,), shape=(vocab_size, model.hidden_size),
                            init="normal", arrangement="vocabulary", is_multiplied=name == "after")  # fmt: skip

    def build_chunk(self, plan: ChunkPlan) -> BigramModel:
        return BigramModel(plan)


def register() -> None:
    ARCHITECTURES["bigram"], KINDS["bigram"] = Architecture(kind="bigram"), Bigram()
    OBJECTIVES["causal"] = tuple(dict.fromkeys([*OBJECTIVES["causal"], "bigram"]))
