"""One pipeline stage's part of a model, of whichever kind."""

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group

from megatron_7b.model.parameters import ParameterTable


class ModelChunk(MegatronModule):
    """What `ModelKind.build_chunk` returns; a kind's own class inherits from it and from megatron-core's.

    Attributes:
        table: Parameters of the whole model, vocabulary padding included.
    """

    table: ParameterTable

    @property
    def stack(self) -> Any:
        """The layers of this chunk, as megatron-core has them."""
        return self.encoder if hasattr(self, "encoder") else self.decoder

    @abstractmethod
    def named_core_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """Yield this chunk's parameters, each under the `core_name` of its row of the table."""

    def state_without_output_layer(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Describe the parameters to megatron-core's checkpoints, as its language models do if they have the layer."""
        described = ensure_metadata_has_dp_cp_group(metadata)
        state: dict[str, Any] = MegatronModule.sharded_state_dict(self, prefix, sharded_offsets, described)
        return state


def cast_learned_vectors(embedding: LanguageModelEmbedding) -> None:
    """Give the vectors of positions and token types the number format of all other parameters.

    megatron-core makes them in FP32, and leaves it to a wrapper around the whole model to cast them.
    """
    for name in ("position_embeddings", "tokentype_embeddings"):
        vectors = getattr(embedding, name, None)
        if vectors is not None:
            vectors.to(embedding.config.params_dtype)
