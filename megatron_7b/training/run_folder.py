"""The run folder: its files, who may write to them, and how a resumed run finds its place.

    R/config.yaml      effective configuration of the newest start
    R/metrics.jsonl    one line per step, one per validation
    R/status.json      state of the run: running, saved, stopped, finished or failed
    R/train.log        the log of the main rank
    R/loss.png         the loss curves, drawn when the run leaves
    R/tokenizer/       files of the tokenizer, which every checkpoint carries on
    R/hugging_face/    what else the imported folder held that the run started from; carried on too
    R/tensorboard/     the same figures for TensorBoard
    R/checkpoints/     step_00000010/ … and `latest`

Only the main rank writes, and whole files appear by rename.
"""

import contextlib
import dataclasses
import fcntl
import json
import logging
import os
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal, TextIO

from megatron_7b.checkpoint.records import HUGGING_FACE, TOKENIZER
from megatron_7b.config import config_to_dict, load_config, save_config
from megatron_7b.config.schema import RunConfig
from megatron_7b.errors import ConfigError, TrainingError
from megatron_7b.runtime.output_paths import check_folder_to_write

logger = logging.getLogger(__name__)

RunState = Literal["running", "saved", "stopped", "finished", "failed"]

# Options of the model section that may change when a run resumes: no weight's shape or meaning depends on them.
_CHANGEABLE_MODEL_OPTIONS = frozenset(
    {"hidden_dropout", "attention_dropout", "init_method_std", "transformer_impl", "make_vocab_size_divisible_by"}
)
# Options whose None means a value derived from elsewhere: the tokenizer, the number of heads.
_DERIVED_MODEL_OPTIONS = frozenset({"vocab_size", "num_query_groups", "kv_channels"})


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """Paths of one run's files."""

    root: Path

    @property
    def config(self) -> Path:
        """Effective configuration of the newest start."""
        return self.root / "config.yaml"

    @property
    def metrics(self) -> Path:
        """One line per step, one per validation."""
        return self.root / "metrics.jsonl"

    @property
    def status(self) -> Path:
        """State of the run."""
        return self.root / "status.json"

    @property
    def log(self) -> Path:
        """The log of the main rank."""
        return self.root / "train.log"

    @property
    def loss_plot(self) -> Path:
        """The loss curves."""
        return self.root / "loss.png"

    @property
    def tokenizer(self) -> Path:
        """Files of the tokenizer."""
        return self.root / TOKENIZER

    @property
    def hugging_face(self) -> Path:
        """What else an imported folder held."""
        return self.root / HUGGING_FACE

    @property
    def tensorboard(self) -> Path:
        """Event files."""
        return self.root / "tensorboard"

    @property
    def checkpoints(self) -> Path:
        """One folder per saved step."""
        return self.root / "checkpoints"

    @property
    def has_history(self) -> bool:
        """Whether an earlier start left something that a new one would build on."""
        return any(self.checkpoints.glob("*")) or (self.metrics.exists() and self.metrics.stat().st_size > 0)


def check_run_folder(folder: RunFolder, config: RunConfig) -> None:
    """Refuse a folder in which another model was trained. Only reads, so every rank can call it before building.

    Args:
        folder: The run folder, which need not exist yet.
        config: Configuration of this start.

    Raises:
        ConfigError: The folder cannot be made or written to, or holds a model of another shape.
    """
    check_folder_to_write(folder.root, "the run folder")
    if not folder.config.exists() or not folder.has_history:
        return
    contradictions = [
        f"  {path}: the folder has {before!r}, this start asks for {after!r}"
        for path, before, after in _differences(load_config(folder.config), config)
        if _contradict(path, before, after)
    ]
    if contradictions:
        raise ConfigError(
            f"{folder.root} holds a run of a model with another shape:\n" + "\n".join(contradictions),
            hint="choose another --run-dir, or start with the model options of the saved config.yaml",
        )


def _contradict(path: str, before: object, after: object) -> bool:
    section, name, *_ = path.split(".")
    if section != "model" or name in _CHANGEABLE_MODEL_OPTIONS:
        return False
    return not (name in _DERIVED_MODEL_OPTIONS and None in (before, after))


@contextlib.contextmanager
def opened(folder: RunFolder, config: RunConfig) -> Iterator[None]:
    """Create the folder if necessary, keep other runs out of it for the duration, and save the configuration.

    For the main rank, after `check_run_folder`.

    Args:
        folder: The run folder.
        config: Effective configuration; changes since the last start are logged.

    Raises:
        ConfigError: The folder cannot be created or written to.
        TrainingError: Another run is writing to it.
    """
    try:
        folder.root.mkdir(parents=True, exist_ok=True)
        lock = (folder.root / ".lock").open("a+", encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"the run folder {folder.root} cannot be written to: {error.strerror}",
            hint="give a --run-dir that you may write to, with free space",
        ) from error
    with lock:
        _claim(folder, lock)
        if folder.config.exists() and folder.has_history:
            for path, before, after in _differences(load_config(folder.config), config):
                logger.info("%s has changed since the last start: %s, was %s", path, after, before)
        save_config(config, folder.config)
        yield


def _claim(folder: RunFolder, lock: TextIO) -> None:
    """Take the folder's lock, which ends with the process; a file system without locks is used without one.

    An earlier life of the same Slurm job does not count as another run: its processes may linger on a node that Slurm
    has given up.
    """
    own_job = os.environ.get("SLURM_JOB_ID")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        _refuse_unless_same_job(folder, lock.read(), own_job)
    except OSError as error:
        logger.warning(
            "%s does not support file locks (%s): make sure that only one run writes there", folder.root, error.strerror
        )
    lock.truncate(0)
    lock.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "slurm_job": own_job}))
    lock.flush()


def _refuse_unless_same_job(folder: RunFolder, holder_text: str, own_job: str | None) -> None:
    try:
        holder = json.loads(holder_text)
    except json.JSONDecodeError:
        holder = {}
    if own_job is not None and holder.get("slurm_job") == own_job:
        logger.warning("process %s on %s, of an earlier life of this job, still lingers", holder["pid"], holder["host"])
        return
    raise TrainingError(
        f"another run is writing to {folder.root}: process {holder.get('pid', '?')} on {holder.get('host', '?')}",
        hint="wait until it has ended, stop it with SIGTERM (it saves first), or choose another --run-dir",
    )


def write_status(folder: RunFolder, state: RunState, *, exit_code: int | None, step: int) -> None:
    """Record the state of the run, for scripts and launchers that do not see our exit code.

    Args:
        folder: The run folder.
        state: `saved` means stopped early with everything saved, `stopped` that it was before the first step of this
            start; both are to be started again.
        exit_code: Exit code of the run's processes; None while it runs.
        step: Steps done.
    """
    replace_text(folder.status, json.dumps({"state": state, "exit_code": exit_code, "step": step}) + "\n")


def keep_metrics_until(folder: RunFolder, step: int) -> list[dict[str, object]]:
    """Drop later steps from metrics.jsonl, because they are about to be repeated, and an incomplete last line.

    The file is always replaced, so that a lingering process of an earlier life that still has the old one open cannot
    write into it.

    Args:
        folder: The run folder.
        step: Last step to keep; 0 empties the file.

    Returns:
        The validation lines that were kept.
    """
    beside = folder.metrics.with_suffix(".jsonl.tmp")
    validations = []
    with beside.open("w", encoding="utf-8") as kept:
        for line, values in read_metrics(folder.metrics):
            line_step = values.get("step")
            if not isinstance(line_step, int) or line_step > step:
                continue
            kept.write(line)
            if "validation_loss" in values:
                validations.append(values)
        kept.flush()
        os.fsync(kept.fileno())
    os.replace(beside, folder.metrics)
    return validations


def read_metrics(path: Path) -> Iterator[tuple[str, dict[str, object]]]:
    """Yield each line of a metrics file, raw and parsed; nothing if there is no file.

    Lines that are not JSON objects are skipped: a kill in the middle of a write leaves one.
    """
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                values = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(values, dict) and line.endswith("\n"):
                yield line, values


def replace_text(path: Path, text: str) -> None:
    """Write a file that appears complete or not at all, and then survives a power failure."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with beside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def _differences(before: RunConfig, after: RunConfig) -> list[tuple[str, object, object]]:
    """Return (dotted path, value before, value after) of every option that differs."""
    old, new = _flatten(config_to_dict(before)), _flatten(config_to_dict(after))
    return [(path, old.get(path), new.get(path)) for path in {**old, **new} if old.get(path) != new.get(path)]


def _flatten(tree: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(_flatten(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = value
    return flat
