"""A teacher on more tensor-parallel ranks than its student: replicas of the student share it, and take turns.

The ranks of one of its tensor-parallel groups are those of several replicas of the student, at the same pipeline stage.
Each replica's texts go through the teacher on all of them; its last hidden states are then on every rank, and who
asked keeps them. Of the output layer each rank also has the rows that it has of the student's, so the logits of both
models are compared as they are at one layout.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_7b.checkpoint.weights import CheckpointWeights
from megatron_7b.config.schema import RunConfig
from megatron_7b.model.kinds.chunk import ModelChunk
from megatron_7b.model.on_ranks import ModelOnRanks
from megatron_7b.model.sizes import padded_vocab_size
from megatron_7b.objective.microbatches import run_outputs
from megatron_7b.objective.objective import Objective
from megatron_7b.parallel.groups import SecondLayout
from megatron_7b.runtime.machine.part_clock import PartClock

if TYPE_CHECKING:
    from megatron_7b.data import Batch


_EMBEDDING, _OUTPUT_LAYER = "embedding.word_embeddings.weight", "output_layer.weight"


@dataclasses.dataclass(frozen=True)
class SharedTeacher:
    """What this rank needs to share a teacher.

    Attributes:
        second: The layout of the teacher.
        group: Its tensor-parallel group: the ranks of some replicas of the student.
        output_weight: The rows of its output layer that this rank has of the student's, [v/tp, h]; on the last stage.
    """

    second: SecondLayout
    group: dist.ProcessGroup
    output_weight: Tensor | None

    def hidden_states(
        self,
        chunks: list[ModelChunk],
        batches: "Sequence[Batch]",
        objective: Objective,
        student: ModelOnRanks,
        clock: PartClock,
    ) -> list[Tensor]:
        """Return the last hidden states of this rank's microbatches, [s, b, h] or [s/tp, b, h]; on the last stage only.

        Args:
            chunks: This rank's part of the teacher.
            batches: This rank's microbatches.
            objective: That of the run.
            student: Where it is.
            clock: Counts apart what is waiting for other ranks.

        Collective: the groups of the teacher.
        """
        layout, size = student.layout, self.group.size()
        of_ranks: list[Sequence[Batch]] = [()] * size
        with clock.part("communication"):
            dist.all_gather_object(of_ranks, batches, group=self.group)
        own: list[Tensor] = []
        for first_rank in range(0, size, layout.tp_size):  # tensor-parallel ranks of the student have the same texts
            texts = of_ranks[first_rank]
            with self.second.in_place():
                outputs = run_outputs(
                    chunks,
                    texts,
                    objective,
                    layout=self.second.layout,
                    device=student.device,
                    beside=[{"wants_states": True}] * len(texts),
                )
            if first_rank <= self.group.rank() < first_rank + layout.tp_size:
                own = outputs
        if student.config.parallel.sequence_parallel:
            return [hidden.chunk(layout.tp_size)[layout.tp_rank].contiguous() for hidden in own]
        return own


def rows_of_student(folder: Path, teacher: RunConfig, student: ModelOnRanks, dtype: torch.dtype) -> Tensor:
    """Return the rows of a teacher's output layer that a rank has of its student's, padding included, [v/tp, h].

    Args:
        folder: Checkpoint of the teacher.
        teacher: What it is built with.
        student: Where this rank is.
        dtype: Of the teacher.

    Raises:
        CheckpointError: Files are damaged.
    """
    layout, vocab_size = student.layout, teacher.model.vocab_size
    assert vocab_size is not None
    divisor = student.config.model.make_vocab_size_divisible_by
    count = padded_vocab_size(vocab_size, divisor, layout.tp_size) // layout.tp_size
    first = layout.tp_rank * count
    held = max(0, min(count, vocab_size - first))
    tied = teacher.model.share_embeddings_and_output_weights
    rows = torch.zeros(count, teacher.model.hidden_size, dtype=dtype, device=student.device)
    if held:
        stored = CheckpointWeights(folder, verify=False)  # as the teacher's weights were, just before
        rows[:held] = stored.rows(_EMBEDDING if tied else _OUTPUT_LAYER, first, first + held)
    return rows
