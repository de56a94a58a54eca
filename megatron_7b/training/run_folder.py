"""The run folder: its files, who may write to them, and how a resumed run finds its place.

    R/config.yaml      effective configuration of the newest start
    R/metrics.jsonl    one line per step, one per validation
    R/metrics.repeated.jsonl  such lines of steps that were done again after a resume
    R/status.json      state of the run: running, saved, stopped, finished or failed
    R/saved.json       the newest step that was saved
    R/train.log        the log of the main rank
    R/loss.png         the loss curves, drawn when the run leaves
    R/tokenizer/       files of the tokenizer, which every checkpoint carries on
    R/hugging_face/    what else the imported folder held that the run started from; carried on too
    R/teacher.id       whom the run has learned from
    R/profile/         traces of some steps, and tables of their kernels
    R/tensorboard/     the same figures for TensorBoard
    R/checkpoints/     step_00000010/ … and `latest`

Only the main rank writes, and whole files appear by rename.
"""

import dataclasses
import json
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

from megatron_7b.checkpoint.folders import find_steps
from megatron_7b.checkpoint.records import HUGGING_FACE, TOKENIZER
from megatron_7b.config import config_to_dict, load_config
from megatron_7b.config.schema import RunConfig
from megatron_7b.config.sources import read_source
from megatron_7b.errors import ConfigError
from megatron_7b.files import flush_to_disk, replace_text
from megatron_7b.runtime.output_paths import check_folder_to_write

logger = logging.getLogger(__name__)

RunState = Literal["running", "saved", "stopped", "finished", "failed"]

# Options of the model section that may change when a run resumes: no weight's shape or meaning depends on them.
_CHANGEABLE_MODEL_OPTIONS = frozenset(
    {
        "hidden_dropout",
        "attention_dropout",
        "moe_aux_loss_coeff",
        "init_method_std",
        "transformer_impl",
        "make_vocab_size_divisible_by",
    }
)
# The same of the adapter section.
_CHANGEABLE_ADAPTER_OPTIONS = frozenset({"dropout", "orth_reg_weight"})
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
    def repeated_metrics(self) -> Path:
        """Lines of steps that were done again after a resume, as they were the first time."""
        return self.root / "metrics.repeated.jsonl"

    @property
    def status(self) -> Path:
        """State of the run."""
        return self.root / "status.json"

    @property
    def saved(self) -> Path:
        """The newest step that was saved, noted outside of the checkpoints folder, so that its loss is noticed."""
        return self.root / "saved.json"

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
    def teacher_note(self) -> Path:
        """Whom the run has learned from."""
        return self.root / "teacher.id"

    @property
    def tensorboard(self) -> Path:
        """Event files."""
        return self.root / "tensorboard"

    @property
    def profile(self) -> Path:
        """Traces and tables of profiled steps."""
        return self.root / "profile"

    @property
    def checkpoints(self) -> Path:
        """One folder per saved step."""
        return self.root / "checkpoints"

    @property
    def best(self) -> Path:
        """The weights that did best in validation (`checkpoint.keep_best`), in a folder of their step."""
        return self.root / "best"

    @property
    def best_record(self) -> Path:
        """How well they did."""
        return self.root / "best.json"

    @property
    def has_history(self) -> bool:
        """Whether an earlier start left something that a new one would build on."""
        return any(self.checkpoints.glob("*")) or (self.metrics.exists() and self.metrics.stat().st_size > 0)


def check_run_folder(folder: RunFolder, config: RunConfig) -> None:
    """Refuse a folder in which another model or adapter was trained. Only reads, so every rank can call it at first.

    Args:
        folder: The run folder, which need not exist yet.
        config: Configuration of this start.

    Raises:
        ConfigError: The folder cannot be made or written to, or its saved configuration cannot be read, or describes a
            model of another shape.
        CheckpointError: Its folder of checkpoints cannot be read.
    """
    check_folder_to_write(folder.root, "the run folder")
    if os.path.lexists(folder.checkpoints):
        check_folder_to_write(folder.checkpoints, "the folder of checkpoints")
    find_steps(folder.checkpoints)
    before = read_saved_config(folder)
    if before is None:
        return
    contradictions = [
        f"  {path}: the folder has {old!r}, this start asks for {new!r}"
        for path, old, new in differences(before, config)
        if _contradict(path, old, new)
    ]
    if contradictions:
        raise ConfigError(
            f"{folder.root} holds a run of a model with another shape:\n" + "\n".join(contradictions),
            hint="choose another --run-dir, or start with the model and adapter options of the saved config.yaml",
        )


def read_saved_config(folder: RunFolder) -> RunConfig | None:
    """Return the configuration of the newest start that left something; None if there is none.

    Raises:
        ConfigError: It is damaged. It is only kept for comparison, so it may be deleted.
    """
    if not folder.config.exists() or not folder.has_history:
        return None
    hint = f"delete {folder.config}: the next start writes it again, but cannot say what has changed since the last"
    try:
        sections = {path.partition(".")[0] for path in read_source(folder.config).settings}
        saved = load_config(folder.config)
    except ConfigError as error:
        raise ConfigError(f"the configuration of the last start cannot be read: {error}", hint=hint) from error
    missing = [section for section in ("model", "training") if section not in sections]
    if missing:
        raise ConfigError(
            f"{folder.config} is damaged: it has no section {' or '.join(missing)}, and every start writes all of them",
            hint=hint,
        )
    return saved


def _contradict(path: str, before: object, after: object) -> bool:
    section, name, *_ = path.split(".")
    if section == "adapter":
        return name not in _CHANGEABLE_ADAPTER_OPTIONS
    if section != "model" or name in _CHANGEABLE_MODEL_OPTIONS:
        return False
    return not (name in _DERIVED_MODEL_OPTIONS and None in (before, after))


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
    """Move later steps from metrics.jsonl to metrics.repeated.jsonl, because they are about to be done again.

    An incomplete last line is dropped. The file is always replaced, so that a lingering process of an earlier life that
    still has the old one open cannot write into it.

    Args:
        folder: The run folder.
        step: Last step to keep; 0 empties the file.

    Returns:
        The lines that were kept of what is not a step: validations, and measurements on tasks.
    """
    kept, repeated, measured, last_step = [], [], [], 0
    for line, values in read_metrics(folder.metrics):
        line_step = values.get("step")
        if not isinstance(line_step, int):
            continue
        if line_step > step:
            repeated.append(line)
            continue
        kept.append(line)
        last_step = line_step
        if "loss" not in values:
            measured.append(values)
    if repeated:
        with folder.repeated_metrics.open("a", encoding="utf-8") as file:
            file.writelines(repeated)
        flush_to_disk(folder.repeated_metrics)
    replace_text(folder.metrics, "".join(kept))
    _say_what_does_not_fit(folder, step, last_step, has_repeated=bool(repeated))
    return measured


def _say_what_does_not_fit(folder: RunFolder, step: int, last_step: int, *, has_repeated: bool) -> None:
    if step == 0 and has_repeated:
        logger.warning(
            "an earlier start did steps here and saved none: starting over; its metrics are in %s",
            folder.repeated_metrics,
        )
    elif last_step < step:
        logger.warning(
            "%s ends at step %d, but the newest checkpoint is of step %d: was it copied here?",
            folder.metrics, last_step, step,
        )  # fmt: skip


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


def differences(before: RunConfig, after: RunConfig) -> list[tuple[str, object, object]]:
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
