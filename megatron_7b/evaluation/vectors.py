"""Vectors of texts by a checkpoint of an embedding run."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from megatron_7b.data.embeddings.encoding import TextEncoder
from megatron_7b.data.embeddings.rows import TextRows
from megatron_7b.model.on_ranks import ModelOnRanks
from megatron_7b.objective.contrastive import TextVectors
from megatron_7b.objective.microbatches import rounds_in_order, run_schedule
from megatron_7b.tokenizer import Tokenizer


@torch.inference_mode()
def embed_texts(
    model: ModelOnRanks,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    *,
    on_progress: Callable[[int, int], None] | None = None,
) -> NDArray[np.float32]:
    """Return a vector of length 1 for each text, as sentence-transformers computes it from the exported folder.

    Args:
        model: A loaded model, whose configuration says how texts are pooled.
        tokenizer: Of the model.
        texts: Those longer than `data.seq_length` lose their ends.
        on_progress: Takes how many rows are done, and how many there are.

    Returns:
        [texts, h], the same on all ranks.

    Collective: all ranks.
    """
    config, layout, encoder = model.config, model.layout, TextEncoder(tokenizer)
    rows = TextRows([encoder.encode(text, config.data.seq_length) for text in texts], config.data.seq_length)
    vectors = np.zeros((len(texts), config.model.hidden_size), np.float32)
    for end, places in rounds_in_order(layout, config.training.micro_batch_size, rows.num_samples):
        # Beyond the end, the last row is read again: it says the same.
        batches = [rows.batch(np.minimum(of_one, rows.num_samples - 1)) for of_one in places]
        outputs = run_schedule(
            model.chunks, batches, TextVectors(config), layout=layout, device=model.device, forward_only=True
        )
        mine = []
        if layout.tp_rank == 0:
            for batch, output in zip(batches, outputs, strict=bool(outputs)):
                assert batch.records is not None
                mine.append((batch.records.numbers, output.cpu().numpy()))
        for numbers, found in _gathered(mine):
            vectors[numbers] = found
        if on_progress is not None:
            on_progress(min(end, rows.num_samples), rows.num_samples)
    return vectors


def _gathered[T](mine: list[T]) -> list[T]:
    """Return what all ranks have found. Collective: all ranks."""
    of_ranks: list[list[T] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(of_ranks, mine)
    return [one for found in of_ranks for one in found or ()]
