"""What the rest of the package asks of a kind of model."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from megatron_7b.config.schema import ModelConfig, RunConfig
from megatron_7b.model.parameters import Parameter, ParameterTable
from megatron_7b.parallel import ParallelLayout

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_7b.model.kernels import Kernels, TransformerImpl
    from megatron_7b.model.kinds.chunk import ModelChunk


@dataclass(frozen=True, kw_only=True)
class ChunkPlan:
    """What one model chunk of a rank is built from.

    Attributes:
        config: The run.
        core_config: The same as megatron-core takes it.
        impl: Whose classes layers are built from.
        kernels: Those classes.
        table: Parameters of the whole model, vocabulary padding included.
        vocab_size: True vocabulary size.
        padded_vocab_size: Rows of the embedding.
        layout: Position of this rank.
        groups: megatron-core's process groups.
        stage: Which of this rank's virtual pipeline stages it is.
    """

    config: RunConfig
    core_config: "TransformerConfig"
    impl: "TransformerImpl"
    kernels: "Kernels"
    table: ParameterTable
    vocab_size: int
    padded_vocab_size: int
    layout: ParallelLayout
    groups: "ProcessGroupCollection"
    stage: int

    @property
    def is_first(self) -> bool:
        """Whether it holds the embedding."""
        return self.layout.is_first_stage and self.stage == 0

    @property
    def is_last(self) -> bool:
        """Whether it computes the loss."""
        return self.layout.is_last_stage and self.stage == self.layout.num_chunks - 1


class ModelKind(Protocol):
    """A kind of model: what its parameters are, and how a rank's part of it is built.

    Attributes:
        core_layers_per_layer: How many layers megatron-core counts where the configuration counts one.
    """

    core_layers_per_layer: int

    def attended_positions(self, model: ModelConfig, seq_length: int, predicted_share: float) -> float:
        """Return how many positions a token attends to on average, added up over the layers.

        Args:
            model: The shape of the model.
            seq_length: Tokens of a sequence; in an encoder-decoder those that the encoder reads.
            predicted_share: How many are predicted for each of them.
        """
        ...

    def parameters(self, model: ModelConfig, vocab_size: int) -> Iterator[Parameter]:
        """Yield every parameter of the whole model in the order of the forward pass. Imports no torch.

        Args:
            model: The shape of the model.
            vocab_size: Rows of the embedding: the true or a padded size.
        """
        ...

    def build_chunk(self, plan: ChunkPlan) -> "ModelChunk":
        """Build one model chunk on the CPU; its parameters may have any values. Collective: none."""
        ...
