"""The one place that builds everything a run consists of: process, tokenizer, groups, model, optimizer, data."""

import dataclasses
import logging
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel

from megatron_7b.checkpoint import Companions
from megatron_7b.checkpoint.companions import forget_other_ids
from megatron_7b.config.schema import RunConfig
from megatron_7b.data import BatchLoader
from megatron_7b.data.samples.corpus_tokenizer import corpus_vocab_size, find_tokenizer
from megatron_7b.data.samples.sample_order import SampleOrder
from megatron_7b.errors import ConfigError
from megatron_7b.files import flush_tree_to_disk, remove_any
from megatron_7b.model.builder import build_model
from megatron_7b.model.core_config import params_dtype
from megatron_7b.model.fitting import check_rank
from megatron_7b.model.kernels import why_no_transformer_engine
from megatron_7b.objective import Objective, build_objective
from megatron_7b.objective.objective import Samples
from megatron_7b.optim.optimizer import Optimizer, wrap_data_parallel
from megatron_7b.parallel import ParallelLayout
from megatron_7b.parallel.groups import initialize_model_parallel, process_groups
from megatron_7b.runtime.cpu.allocator import keep_freed_memory
from megatron_7b.runtime.machine.device import DeviceType, torch_device
from megatron_7b.runtime.process.distributed import initialize_process
from megatron_7b.tokenizer import Tokenizer
from megatron_7b.training.agreement import Ranks
from megatron_7b.training.history import find_start
from megatron_7b.training.prerequisites import companions_of_weights
from megatron_7b.training.progress import Progress, read_progress
from megatron_7b.training.run_data import open_run_data
from megatron_7b.training.run_folder import RunFolder, check_run_folder

logger = logging.getLogger(__name__)


@dataclasses.dataclass
class Core:
    """Everything that a training step computes with.

    Attributes:
        config: The effective configuration: `model.vocab_size` is filled in.
        layout: Position of this rank.
        device_type: Where this rank computes.
        model: This rank's model chunks, with gradient buffers.
        optimizer: AdamW over them.
        objective: What they are trained for.
    """

    config: RunConfig
    layout: ParallelLayout
    device_type: DeviceType
    model: list[DistributedDataParallel]
    optimizer: Optimizer
    objective: Objective

    @property
    def device(self) -> torch.device:
        """The device of this rank."""
        return torch_device(self.device_type)


@dataclasses.dataclass
class Trainer(Core):
    """A core with its data.

    Attributes:
        progress: How far the run had come when the data was opened.
        sample_order: What a checkpoint records of the training samples.
        loader: This rank's share of the training samples.
        valid_loader: The same for validation; None where there is no validation data.
        companions: What checkpoints carry, as it is where the weights come from.
        tokenizer: That of the data; None if it is not known.
    """

    progress: Progress
    sample_order: SampleOrder
    loader: BatchLoader
    valid_loader: BatchLoader | None
    companions: Companions
    tokenizer: Tokenizer | None


def build_trainer(config: RunConfig, run_dir: Path) -> Trainer:
    """Build everything, from the process group to the data, on the ranks of the launcher's environment.

    Args:
        config: The run, checked.
        run_dir: The run folder, which is only read.

    Collective: all ranks.

    Raises:
        ConfigError: the device, the layout, the tokenizer or the corpus does not fit.
        DataFormatError: a corpus or tokenizer is damaged.
    """
    folder = RunFolder(run_dir)
    companions = companions_of_weights(config, folder)
    tokenizer = find_tokenizer(config.data, of_model=companions.tokenizer)
    config = with_vocab_size(config, tokenizer)
    check_run_folder(folder, config)  # again: the vocabulary was not known before
    device_type = initialize_process(config.runtime)
    ranks = Ranks(torch_device(device_type))
    progress = find_progress(folder, config, ranks)
    # Before the model, which takes longer: data that does not fit is refused at once.
    data = open_run_data(config, progress, ranks, objective=build_objective(config), tokenizer=tokenizer)
    core = build_core(config, device_type)
    if tokenizer is None and core.layout.is_main:
        logger.warning("the tokenizer is not known: checkpoints and exports will not include it; set data.tokenizer")
    return Trainer(
        **{field.name: getattr(core, field.name) for field in dataclasses.fields(core)},
        progress=progress,
        sample_order=data.train.order,
        loader=_build_loader(core, data.train),
        valid_loader=_build_loader(core, data.valid) if data.valid is not None else None,
        companions=companions,
        tokenizer=tokenizer,
    )


def with_vocab_size(config: RunConfig, tokenizer: Tokenizer | None) -> RunConfig:
    """Return the configuration with the true vocabulary size filled in.

    Raises:
        ConfigError: it is not known, or the model's is smaller than the tokenizer's.
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


def build_core(config: RunConfig, device_type: DeviceType) -> Core:
    """Build model and optimizer on the ranks of the default process group.

    Args:
        config: The run; `model.vocab_size` is set.
        device_type: Where to compute.

    Collective: all ranks.

    Raises:
        ConfigError: the layout does not fit the number of ranks, a kernel was asked for that is not there, or the model
            cannot fit into memory.
    """
    assert config.model.vocab_size is not None
    state_dtype, missing = config.precision.optimizer_state_dtype, why_no_transformer_engine(device_type)
    if state_dtype != "fp32" and missing is not None:
        raise ConfigError(
            f"precision.optimizer_state_dtype is {state_dtype!r}, which needs Transformer Engine, but {missing}",
            hint="set it to fp32, or on a machine with a GPU: pip install 'megatron_7b[gpu]'",
        )
    check_rank(
        config, on_gpu=device_type == "cuda", rank=dist.get_rank(), world_size=dist.get_world_size(), is_training=True
    )
    if device_type == "cpu":
        keep_freed_memory()
    layout = initialize_model_parallel(
        config.parallel, seed=config.training.seed, timeout_minutes=config.runtime.distributed_timeout_minutes
    )
    groups = process_groups()
    chunks = build_model(
        config, vocab_size=config.model.vocab_size, layout=layout, groups=groups, device_type=device_type
    )
    model = wrap_data_parallel(list(chunks), config, groups)
    optimizer = Optimizer(model, config, params_dtype(config.precision, device_type))
    return Core(
        config=config,
        layout=layout,
        device_type=device_type,
        model=model,
        optimizer=optimizer,
        objective=build_objective(config),
    )


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


def _build_loader(core: Core, dataset: Samples) -> BatchLoader:
    return BatchLoader(
        dataset,
        micro_batch_size=core.config.training.micro_batch_size,
        data_parallel_rank=core.layout.dp_rank,
        data_parallel_size=core.layout.dp_size,
        num_workers=core.config.data.num_workers,
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
