"""The one place that builds everything a run consists of: process, tokenizer, groups, model, optimizer, data."""

import dataclasses
import logging
import tempfile
from pathlib import Path

from megatron_7b.checkpoint import Companions
from megatron_7b.checkpoint.companions import forget_other_ids
from megatron_7b.config.schema import RunConfig
from megatron_7b.data import BatchLoader
from megatron_7b.data.samples.corpus_tokenizer import corpus_vocab_size, find_tokenizer
from megatron_7b.data.samples.loader import ReadsBatches
from megatron_7b.data.samples.sample_order import SampleOrder
from megatron_7b.data.samples.teacher_logits import TaughtSamples
from megatron_7b.errors import ConfigError
from megatron_7b.files import flush_tree_to_disk, remove_any
from megatron_7b.model.adapter import Adapter
from megatron_7b.objective import build_objective
from megatron_7b.objective.objective import Samples
from megatron_7b.runtime.machine.device import torch_device
from megatron_7b.runtime.process.distributed import initialize_process
from megatron_7b.tokenizer import Tokenizer
from megatron_7b.training.agreement import Ranks
from megatron_7b.training.history import find_start
from megatron_7b.training.learner import Learner, build_learner
from megatron_7b.training.prerequisites import companions_of_weights
from megatron_7b.training.progress import Progress, read_progress
from megatron_7b.training.run_data import open_run_data
from megatron_7b.training.run_folder import RunFolder, check_run_folder
from megatron_7b.training.run_tasks import RunTasks, open_tasks
from megatron_7b.training.teacher_check import check_teacher

logger = logging.getLogger(__name__)


@dataclasses.dataclass
class Trainer:
    """A model that learns, and its data.

    Attributes:
        learner: The model, its optimizer and objective.
        progress: How far the run had come when the data was opened.
        sample_order: What a checkpoint records of the training samples.
        loader: This rank's share of the training samples.
        valid_loader: The same for validation; None where there is no validation data.
        companions: What checkpoints carry, as it is where the weights come from.
        tokenizer: That of the data; None if it is not known.
        tasks: What the model is measured on as it trains, beside validation; None: no tasks.
    """

    learner: Learner
    progress: Progress
    sample_order: SampleOrder
    loader: BatchLoader
    valid_loader: BatchLoader | None
    companions: Companions
    tokenizer: Tokenizer | None
    tasks: RunTasks | None = None


def build_trainer(config: RunConfig, run_dir: Path, adapter: Adapter | None = None) -> Trainer:
    """Build everything, from the process group to the data, on the ranks of the launcher's environment.

    Args:
        config: The run, checked.
        run_dir: The run folder, which is only read.
        adapter: Added to the model; only what it trains is trained.

    Collective: all ranks.

    Raises:
        ConfigError: The device, the layout, the tokenizer or the corpus does not fit.
        DataFormatError: A corpus or tokenizer is damaged.
    """
    folder = RunFolder(run_dir)
    companions = companions_of_weights(config, folder)
    tokenizer = find_tokenizer(config.data, of_model=companions.tokenizer)
    config = with_vocab_size(config, tokenizer)
    check_run_folder(folder, config)  # again: the vocabulary was not known before
    if config.distillation.is_used:
        check_teacher(config, tokenizer)
    device_type = initialize_process(config.runtime)
    ranks = Ranks(torch_device(device_type))
    progress = find_progress(folder, config, ranks)
    # Before the model, which takes longer: data that does not fit is refused at once.
    data = open_run_data(config, progress, ranks, objective=build_objective(config), tokenizer=tokenizer)
    tasks = open_tasks(config, ranks, tokenizer)
    learner = build_learner(config, device_type, adapter=adapter)
    if tokenizer is None and learner.layout.is_main:
        logger.warning("the tokenizer is not known: checkpoints and exports will not include it; set data.tokenizer")
    return Trainer(
        learner=learner,
        progress=progress,
        sample_order=data.train.order,
        loader=_build_loader(learner, _taught(data.train, config, progress)),
        valid_loader=_build_loader(learner, data.valid) if data.valid is not None else None,
        companions=companions,
        tokenizer=tokenizer,
        tasks=tasks,
    )


def _taught(samples: Samples, config: RunConfig, progress: Progress) -> ReadsBatches:
    """Join to the samples of a run what a teacher has said of them, if that was written."""
    cached = config.distillation.cached_logits
    return samples if cached is None else TaughtSamples(samples, cached, progress.samples_at_end(config), config.data)


def with_vocab_size(config: RunConfig, tokenizer: Tokenizer | None) -> RunConfig:
    """Return the configuration with the true vocabulary size filled in.

    Raises:
        ConfigError: It is not known, or the model's is smaller than the tokenizer's.
    """
    known = tokenizer.vocab_size if tokenizer is not None else corpus_vocab_size(config.data)
    wanted = config.model.vocab_size
    if wanted is None and known is None:
        raise ConfigError(
            "model.vocab_size is not set, and the tokenizer is not known either",
            hint="set data.tokenizer, or have the corpus name one: `megatron-7b data adopt PREFIX --tokenizer DIR`",
        )
    if wanted is not None and known is not None and wanted < known:
        raise ConfigError(
            f"model.vocab_size is {wanted}, but the tokenizer has {known} tokens",
            hint=f"leave model.vocab_size out, or set it to at least {known}",
        )
    return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=wanted or known))


def find_progress(folder: RunFolder, config: RunConfig, ranks: Ranks) -> Progress:
    """Return what the main rank reads, on all ranks: a shared file system may show it to other ranks later.

    Collective: all ranks.

    Raises:
        CheckpointError: The newest checkpoint's record cannot be read, or checkpoints that were saved are gone.
    """
    progress = Progress()
    with ranks.together("looking for a checkpoint to resume from"):
        if ranks.is_main:
            find_start(folder)
            progress = read_progress(folder.checkpoints, config)
    return ranks.from_main(progress)


def _build_loader(learner: Learner, dataset: ReadsBatches) -> BatchLoader:
    return BatchLoader(
        dataset,
        micro_batch_size=learner.config.training.micro_batch_size,
        data_parallel_rank=learner.layout.dp_rank,
        data_parallel_size=learner.layout.dp_size,
        num_workers=learner.config.data.num_workers,
    )


def keep_companions(trainer: Trainer, run_folder: RunFolder) -> None:
    """Copy the companions into the run folder, so that checkpoints carry them even if the originals move.

    What the weights came with is kept as it is; a tokenizer that they came without writes its own files. For the main
    rank, which holds the folder's lock.
    """
    companions, tokenizer = trainer.companions, trainer.tokenizer
    with tempfile.TemporaryDirectory(prefix=".companions.", suffix=".tmp", dir=run_folder.root) as name:
        staging = Path(name)
        if not run_folder.has_history:
            for unwanted in (run_folder.tokenizer, run_folder.hugging_face):
                remove_any(unwanted)  # of a start that failed before its first step
            companions.copy_to(staging)
        if companions.tokenizer is None and tokenizer is not None:
            tokenizer.save(staging / run_folder.tokenizer.name)
            forget_other_ids(staging / run_folder.hugging_face.name, tokenizer.eod_id)
        flush_tree_to_disk(staging)
        for copy in staging.iterdir():
            copy.rename(run_folder.root / copy.name)
