"""What a run needs and can be looked at without torch: a mistake is answered at once, before any rank is started."""

import dataclasses
from importlib.util import find_spec
from pathlib import Path

from megatron_7b.checkpoint import Companions, resolve_checkpoint
from megatron_7b.checkpoint.base import check_is_whole, find_base_to_resume
from megatron_7b.config.schema import RunConfig, TelemetryConfig
from megatron_7b.data import has_split
from megatron_7b.data.samples.corpus_tokenizer import find_tokenizer
from megatron_7b.errors import ConfigError
from megatron_7b.evaluation.harness.running import check_harness
from megatron_7b.objective import build_objective
from megatron_7b.runtime.process.launch import is_rank
from megatron_7b.training.history import find_start
from megatron_7b.training.progress import Progress, read_progress
from megatron_7b.training.run_folder import RunFolder, check_run_folder
from megatron_7b.training.teacher_check import check_teacher


def check_prerequisites(config: RunConfig, run_dir: Path) -> None:
    """Refuse a run whose folder, corpora or services cannot be used. Only reads. Collective: none.

    Args:
        config: The run, checked.
        run_dir: The run folder, which need not exist yet.

    Raises:
        CheckpointError: The newest checkpoint is damaged, or checkpoints that were saved are gone.
        ConfigError: The run folder cannot be made or holds another model, a package is missing, the data does not
            suffice or does not continue what was read, its tokenizer lacks a token that the objective needs, or the
            teacher is of other tokens or does not fit the layout.
        DataFormatError: A corpus is truncated, foreign, or smaller than one sample.
    """
    folder = RunFolder(run_dir)
    check_run_folder(folder, config)
    check_telemetry(config.telemetry)
    # Ranks look for the newest checkpoint together: on a shared file system some may see it later.
    progress = None
    if not is_rank():
        check_weights(config, find_start(folder))
        progress = read_progress(folder.checkpoints, config)
    check_data(config, progress)
    objective = build_objective(config)
    if objective.needs_tokenizer or config.distillation.is_used:
        companions = companions_of_weights(config, folder)
        tokenizer = find_tokenizer(config.data, of_model=companions.tokenizer)
        if objective.needs_tokenizer:
            objective.check_tokenizer(config, tokenizer)
        if config.distillation.is_used:
            check_teacher(config, tokenizer)


def check_weights(config: RunConfig, newest: Path | None) -> None:
    """Refuse weights that are not all there: an adapter without its model.

    Args:
        config: The run, checked.
        newest: The checkpoint that it resumes from, if there is one.

    Raises:
        CheckpointError: The model that the checkpoint's adapter belongs to is not found, or a fresh run would start
            from an adapter.
    """
    source = config.checkpoint.initialize_from
    if newest is not None:
        find_base_to_resume(newest, source)
    elif source is not None:
        check_is_whole(resolve_checkpoint(Path(source)))


def check_telemetry(telemetry: TelemetryConfig) -> None:
    """Refuse a configuration that needs a package which is not installed.

    Raises:
        ConfigError: Weights & Biases or tasks are asked for, and what they need is not installed.
    """
    if telemetry.eval_tasks:
        check_harness()
    if telemetry.wandb and find_spec("wandb") is None:
        raise ConfigError(
            "telemetry.wandb is true, but the package wandb is not installed",
            hint="pip install 'megatron-7b[wandb]', or set telemetry.wandb to false (TensorBoard needs nothing)",
        )


def check_data(config: RunConfig, progress: Progress | None) -> None:
    """Open every corpus once: what a truncated file is the cause of is not reported as something else later.

    The contents of the corpora are compared later, by all ranks together.

    Args:
        config: The run, checked.
        progress: How far it has come; None if that is not known yet.

    Raises:
        ConfigError: The data does not suffice, or does not continue what was read.
        DataFormatError: A corpus is truncated, foreign or inconsistent, or smaller than one sample.
    """
    objective = build_objective(config)
    train = objective.open_windows(config, "train", reached=progress.reached if progress else None)
    if progress is not None:
        train.check_end(progress.samples_at_end(config))
    if has_split(config.data, "valid", window_length=objective.window_length(config)):
        objective.open_windows(config, "valid")


def companions_of_weights(config: RunConfig, folder: RunFolder) -> Companions:
    """Return the companions of the weights that the run continues with, or starts from; there may be none yet."""
    if folder.has_history:
        return Companions.of(folder.root)
    start = config.checkpoint.initialize_from
    companions = Companions() if start is None else Companions.of_checkpoint(resolve_checkpoint(Path(start)))
    if config.finetune.task is not None and config.data.tokenizer is not None:
        # The same tokens, with the chat template that the run learns.
        companions = dataclasses.replace(companions, tokenizer=Path(config.data.tokenizer))
    return companions
