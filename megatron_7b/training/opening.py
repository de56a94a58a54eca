"""Opening a run folder: keeping other runs out of it, finding what to resume from, leaving it in order."""

import contextlib
import dataclasses
import logging
from collections.abc import Iterator
from pathlib import Path

from megatron_7b.checkpoint.publishing import recover
from megatron_7b.config import save_config
from megatron_7b.config.schema import RunConfig
from megatron_7b.errors import ConfigError
from megatron_7b.files import remove_interrupted
from megatron_7b.training.folder_lock import FolderLock
from megatron_7b.training.history import find_start, warn_of_lost_steps
from megatron_7b.training.run_folder import RunFolder, differences, read_saved_config

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class OpenFolder:
    """A run folder that no other run writes to.

    Attributes:
        lock: Our hold on it.
        newest: The checkpoint to resume from; None if nothing has been saved yet.
    """

    lock: FolderLock
    newest: Path | None


@contextlib.contextmanager
def open_folder(folder: RunFolder, config: RunConfig) -> Iterator[OpenFolder]:
    """Create the folder if necessary, keep other runs out of it for the duration, and save the configuration.

    For the main rank, after `check_run_folder`. Nothing is written before it is clear that the run can use the folder.

    Args:
        folder: The run folder.
        config: Effective configuration; changes since the last start are logged.

    Raises:
        ConfigError: The folder cannot be created or written to.
        TrainingError: Another run is writing to it.
        CheckpointError: What has been saved there cannot be found, or is damaged.
    """
    try:
        folder.root.mkdir(parents=True, exist_ok=True)
        lock = FolderLock(folder.root)
    except OSError as error:
        raise ConfigError(
            f"the run folder {folder.root} cannot be written to: {error.strerror}",
            hint="give a --run-dir that you may write to, with free space",
        ) from error
    with contextlib.closing(lock):
        if folder.checkpoints.is_dir():
            recover(folder.checkpoints)
        if folder.best.is_dir():
            recover(folder.best)
        newest = find_start(folder)
        if newest is not None:
            warn_of_lost_steps(folder, newest)
        remove_interrupted(folder.root)
        before = read_saved_config(folder)
        if before is not None:
            for path, old, new in differences(before, config):
                logger.info("%s has changed since the last start: %s, was %s", path, new, old)
        save_config(config, folder.config)
        yield OpenFolder(lock, newest)
