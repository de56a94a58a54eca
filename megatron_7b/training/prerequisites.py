"""What a run needs and can be looked at without torch: a mistake is answered at once, before any rank is started."""

import dataclasses
from importlib.util import find_spec
from pathlib import Path

from megatron_7b.config.schema import RunConfig, TelemetryConfig
from megatron_7b.data import IndexedDataset, open_split, parse_blend
from megatron_7b.errors import ConfigError
from megatron_7b.runtime.launch import is_rank
from megatron_7b.training.history import find_start
from megatron_7b.training.progress import Progress, read_progress
from megatron_7b.training.run_folder import RunFolder, check_run_folder


def check_prerequisites(config: RunConfig, run_dir: Path) -> None:
    """Refuse a run whose folder, corpora or services cannot be used. Only reads. Collective: none.

    Args:
        config: The run, checked.
        run_dir: The run folder, which need not exist yet.

    Raises:
        CheckpointError: The newest checkpoint is damaged, or checkpoints that were saved are gone.
        ConfigError: The run folder cannot be made or holds another model, a package is missing, or the data does not
            suffice or does not continue what was read.
        DataFormatError: A corpus is truncated, foreign, or smaller than one sample.
    """
    folder = RunFolder(run_dir)
    check_run_folder(folder, config)
    check_telemetry(config.telemetry)
    # Ranks look for the newest checkpoint together: on a shared file system some may see it later.
    progress = None
    if not is_rank():
        find_start(folder)
        progress = read_progress(folder.checkpoints, config)
    check_data(config, progress)


def check_telemetry(telemetry: TelemetryConfig) -> None:
    """Refuse a configuration that needs a package which is not installed.

    Raises:
        ConfigError: Weights & Biases is asked for and not installed.
    """
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
    # Neither has an influence on what is read, and both would ask for the tokenizer.
    data = dataclasses.replace(config.data, eod_mask_loss=False, fim_rate=0.0)
    train = open_split(data, "train", seed=config.training.seed, reached=progress.reached if progress else None)
    if progress is not None:
        train.check_end(progress.samples_at_end(config))
    for part in parse_blend(data.valid) if data.valid else ():
        IndexedDataset(part.prefix)
