"""A second model in the same job that a run learns from: built, loaded and asked at the layout of the run.

Before the schedule of a step, the teacher's own goes over the same microbatches, forward only. What is kept of it is
the last hidden states of each, on the last stage: their logits are made, a few hundred tokens at a time, where the
student's are (`model.distillation`). So schedules do not matter, and stages may hold other numbers of layers.
"""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import xxhash

from megatron_7b.checkpoint.folders import resolve_checkpoint
from megatron_7b.checkpoint.load import load_weights
from megatron_7b.checkpoint.manifest import read_manifest
from megatron_7b.config.schema import RunConfig
from megatron_7b.data.samples.teacher_logits import CachedLogits
from megatron_7b.errors import ConfigError
from megatron_7b.files import replace_text
from megatron_7b.model.builder import build_model
from megatron_7b.model.distillation import Taught
from megatron_7b.model.kinds.chunk import ModelChunk
from megatron_7b.model.kinds.decoder.network import LanguageModel
from megatron_7b.model.on_ranks import ModelOnRanks
from megatron_7b.model.sizes import count_parameters
from megatron_7b.objective.microbatches import run_outputs
from megatron_7b.objective.objective import Judging
from megatron_7b.parallel.groups import process_groups
from megatron_7b.training.teacher_check import teacher_config

if TYPE_CHECKING:
    from megatron_7b.data import Batch
    from megatron_7b.training.run import Run

logger = logging.getLogger(__name__)

_NOTE = "teacher.id"
"""File of the run folder that names the teacher which the run has learned from."""


@dataclasses.dataclass(frozen=True)
class Teacher:
    """This rank's part of the teacher.

    Attributes:
        student: Where it is, and how it is compared with.
        chunks: Its model chunks, in evaluation mode.
    """

    student: ModelOnRanks
    chunks: list[ModelChunk]

    @torch.no_grad()
    def answers(self, batches: "Sequence[Batch]", objective: Judging) -> list[Mapping[str, Any]]:
        """Return what it says of each microbatch, as the student's forward takes it; on other stages nothing.

        Collective: the tensor-, context- and pipeline-parallel groups.
        """
        layout = self.student.layout
        states = run_outputs(
            self.chunks,
            batches,
            objective,
            layout=layout,
            device=self.student.device,
            beside=[{"wants_states": True}] * len(batches),
        )
        if not layout.is_last_stage:
            return [{}] * len(batches)
        weight = cast(LanguageModel, self.chunks[-1]).output_weight()
        how = self.student.config.distillation
        return [{"taught": Taught(hidden, weight, how)} for hidden in states]


def build_teacher(config: RunConfig, student: ModelOnRanks) -> Teacher:
    """Build the teacher of a run at the student's layout, and load its weights.

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
    assert own.model.vocab_size is not None
    chunks = build_model(
        own,
        vocab_size=own.model.vocab_size,
        layout=student.layout,
        groups=process_groups(),
        device_type=student.device_type,
        initialize=False,
    )
    load_weights(folder, chunks, verify=config.checkpoint.verify_on_load)
    for chunk in chunks:
        chunk.eval().requires_grad_(False)
    if student.layout.is_main:
        count = count_parameters(own.model) / 1e6
        logger.info("learning from %s: a teacher of %.4g M parameters in this job", folder, count)
    return Teacher(student, chunks)


def teacher_identity(config: RunConfig) -> str:
    """Return a hash of what decides what a teacher says: its weights, wherever they are, and how it computes."""
    if config.distillation.cached_logits is not None:
        return CachedLogits.read(config.distillation.cached_logits).teacher
    folder = resolve_checkpoint(Path(str(config.distillation.teacher)))
    return f"{weights_identity(folder)}-{config.distillation.teacher_dtype}"


def weights_identity(folder: Path) -> str:
    """Return a hash of the weights of a checkpoint, wherever it is."""
    files = {name: file for name, file in read_manifest(folder).files.items() if name.endswith(".distcp")}
    return xxhash.xxh3_64_hexdigest(repr(sorted(files.items())).encode())[:8]


def keep_teacher(run: "Run") -> None:
    """Note in the run folder whom a run learns from, and refuse to continue it with another teacher.

    Collective: all ranks.

    Raises:
        ConfigError: The run has learned from another one so far.
    """
    with run.ranks.together("looking for the teacher of earlier starts"):
        if run.ranks.is_main:
            _keep(run)


def _keep(run: "Run") -> None:
    note, distillation = run.folder.root / _NOTE, run.config.distillation
    known = note.read_text(encoding="utf-8").split() if run.step > 0 and note.is_file() else []
    if not distillation.is_used:
        if known:
            logger.warning("the run has learned from the teacher %s so far, and continues without it", known[0])
        return
    identity = teacher_identity(run.config)
    if known and known[0] != identity:
        raise ConfigError(
            f"distillation.teacher is {distillation.teacher} ({identity}), but the run has learned from another one "
            f"({known[0]}) so far",
            hint=f"name the teacher of before, choose another --run-dir, or delete {note} to change it on purpose",
        )
    replace_text(note, identity + "\n")
