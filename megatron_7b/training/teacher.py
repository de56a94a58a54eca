"""A second model in the same job that a run learns from: built, loaded and asked at the layout of the run.

Before the schedule of a step, the teacher's own goes over the same microbatches, forward only. What is kept of it is
the last hidden states of each, on the last stage: their logits are made, a few hundred tokens at a time, where the
student's are (`model.distillation`). So schedules do not matter, and stages may hold other numbers of layers. Of a
teacher with a head it is what the head says. Where layers are compared, every stage keeps what its own have shown
(`model.matching`).
"""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_7b.checkpoint.folders import resolve_checkpoint
from megatron_7b.checkpoint.load import load_weights
from megatron_7b.checkpoint.manifest import read_config
from megatron_7b.config.schema import ModelConfig, RunConfig
from megatron_7b.model.adapter import Adapter
from megatron_7b.model.builder import build_model
from megatron_7b.model.core_config import params_dtype
from megatron_7b.model.distillation import Taught
from megatron_7b.model.kinds import kind_of
from megatron_7b.model.kinds.chunk import ModelChunk
from megatron_7b.model.kinds.decoder.network import LanguageModel
from megatron_7b.model.kinds.encoder.network import EncoderModel
from megatron_7b.model.layer_pairs import LayerPair, find_layer_pairs
from megatron_7b.model.matching import Compared, Matching
from megatron_7b.model.on_ranks import ModelOnRanks
from megatron_7b.model.projections import projections
from megatron_7b.model.sizes import count_parameters
from megatron_7b.objective.inputs import as_model_reads
from megatron_7b.objective.microbatches import run_outputs
from megatron_7b.objective.objective import ASIDE, Objective
from megatron_7b.parallel import ParallelLayout
from megatron_7b.parallel.groups import process_groups, second_layout, sum_over_replicas
from megatron_7b.runtime.machine.part_clock import PartClock
from megatron_7b.training.shared_teacher import SharedTeacher, rows_of_student
from megatron_7b.training.teacher_check import teacher_config

if TYPE_CHECKING:
    from megatron_7b.data import Batch

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Teacher:
    """This rank's part of the teacher.

    Attributes:
        student: Where it is, and how it is compared with.
        chunks: Its model chunks, in evaluation mode.
        matching: What compares its layers with the student's, if they are.
        shared: How replicas of the student share it, if it has a layout of its own.
    """

    student: ModelOnRanks
    chunks: list[ModelChunk]
    matching: Matching | None = None
    shared: SharedTeacher | None = None

    @torch.no_grad()
    def answers(self, batches: "Sequence[Batch]", objective: Objective, clock: PartClock) -> list[Mapping[str, Any]]:
        """Return what it says of each microbatch, as the student's forward takes it; on other stages nothing.

        Args:
            batches: This rank's microbatches.
            objective: That of the run.
            clock: Counts apart what is waiting for other ranks.

        Collective: the tensor-, context- and pipeline-parallel groups; where layers are compared, all ranks.
        """
        how = self.student.config.distillation
        if self.shared is not None:
            states = self.shared.hidden_states(self.chunks, batches, objective, self.student, clock)
            weight = self.shared.output_weight
            return [{}] * len(batches) if weight is None else [{"taught": Taught(h, weight, None, how)} for h in states]
        if self.matching is not None:
            self.matching.begin()
        layout, has_head = self.student.layout, self.student.config.model.has_head
        outputs = run_outputs(
            self.chunks,
            batches,
            objective,
            layout=layout,
            device=self.student.device,
            beside=None if has_head else [{"wants_states": True}] * len(batches),
        )
        if self.matching is not None:
            self._expect_student(self.matching, batches, objective, clock)
        if not layout.is_last_stage:
            return [{}] * len(batches)
        if has_head:
            return [{ASIDE: logits} for logits in outputs]
        model = cast(LanguageModel | EncoderModel, self.chunks[-1])
        weight, bias = model.output_weight(), getattr(model.output_layer, "bias", None)
        return [{"taught": Taught(hidden, weight, bias, how)} for hidden in outputs]

    def _expect_student(
        self, matching: Matching, batches: "Sequence[Batch]", objective: Objective, clock: PartClock
    ) -> None:
        """Say which tokens of each microbatch are compared. Collective: the data-parallel group."""
        layout, chosen = self.student.layout, [objective.states_compared(batch) for batch in batches]
        counts = torch.tensor(
            [sum(map(objective.num_losses, batches)), sum(int(rows.sum()) for rows in chosen)],
            dtype=torch.float64,
            device=self.student.device,
        )
        with clock.part("communication"):  # context-parallel ranks have the same batches
            num_losses, num_tokens = (sum_over_replicas(counts) / layout.cp_size).tolist()
        compared = [self._compared(batch, rows) for batch, rows in zip(batches, chosen, strict=True)]
        matching.expect(compared, num_losses=num_losses, num_tokens=num_tokens)

    def _compared(self, batch: "Batch", chosen: NDArray[np.bool_]) -> Compared:
        layout = self.student.layout
        rows = as_model_reads(torch.from_numpy(chosen.astype(np.float32)), batch, layout).to(self.student.device)
        weights = tokens = rows.t().contiguous()
        if self.student.config.parallel.sequence_parallel:
            weights = weights.chunk(layout.tp_size)[layout.tp_rank]
        bounds = [] if batch.cu_seqlens is None else batch.cu_seqlens.tolist()
        texts = [text for text in pairwise(bounds) if chosen.reshape(-1)[slice(*text)].any()]
        return Compared(weights, tokens.flatten(), texts)


def layer_pairs_of(config: RunConfig) -> tuple[tuple[LayerPair, ...], ModelConfig]:
    """Return which layers of a run are compared with its teacher's, and the shape of the teacher.

    Raises:
        ConfigError: The map does not fit.
    """
    teacher = read_config(resolve_checkpoint(Path(str(config.distillation.teacher)))).model
    return find_layer_pairs(config.distillation, config.model, teacher, config.parallel), teacher


def projections_of(config: RunConfig) -> Adapter | None:
    """Return what a run trains beside its model to compare it with a teacher of another width; None if it need not.

    Raises:
        ConfigError: The map of layers does not fit.
    """
    if not config.distillation.hidden:
        return None
    pairs, teacher = layer_pairs_of(config)
    width, count = config.model.hidden_size, kind_of(config.model).core_layers_per_layer
    if width == teacher.hidden_size:
        return None
    return projections(pairs, width, teacher.hidden_size, core_layers_per_layer=count)


def build_teacher(config: RunConfig, student: ModelOnRanks) -> Teacher:
    """Build the teacher of a run at the student's layout, or with more tensor-parallel ranks, and load its weights.

    Args:
        config: The run; `model.vocab_size` is set, and `distillation.teacher` names a checkpoint.
        student: The model that learns.

    Collective: all ranks.

    Raises:
        CheckpointError: Files are damaged.
        ConfigError: It does not fit the student or the layout.
    """
    folder = resolve_checkpoint(Path(str(config.distillation.teacher)))
    own = teacher_config(config, folder)
    if config.distillation.teacher_tensor_model_parallel_size is None:
        chunks, shared = _build_chunks(folder, own, student, student.layout), None
    else:
        second = second_layout(own.parallel, timeout_minutes=config.runtime.distributed_timeout_minutes)
        with second.in_place():
            chunks, group = _build_chunks(folder, own, student, second.layout), process_groups().tp
        dtype = params_dtype(own.precision, student.device_type)
        rows = rows_of_student(folder, own, student, dtype) if student.layout.is_last_stage else None
        shared = SharedTeacher(second, group, rows)
    if student.layout.is_main:
        count = count_parameters(own.model) / 1e6
        logger.info("learning from %s: a teacher of %.4g M parameters in this job", folder, count)
    if not config.distillation.compares_layers:
        return Teacher(student, chunks, shared=shared)
    pairs, _ = layer_pairs_of(config)
    return Teacher(student, chunks, Matching(student, chunks, pairs, config.distillation))


def _build_chunks(folder: Path, own: RunConfig, student: ModelOnRanks, layout: ParallelLayout) -> list[ModelChunk]:
    """Return this rank's part of the teacher at a layout that is in place. Collective: all ranks."""
    assert own.model.vocab_size is not None
    chunks = build_model(
        own,
        vocab_size=own.model.vocab_size,
        layout=layout,
        groups=process_groups(),
        device_type=student.device_type,
        initialize=False,
    )
    load_weights(folder, chunks, verify=own.checkpoint.verify_on_load)
    for chunk in chunks:
        chunk.eval().requires_grad_(False)
    return chunks
