"""The tasks of lm-evaluation-harness, found without reading all 14,000 of them, and their data from local files.

The harness's tasks say which data set of the Hugging Face hub they read. Here its rows may be files of one's own, in a
folder that is named like the data set, with a file or a folder per split:

    DATA/hellaswag/validation.jsonl
    DATA/ai2_arc/ARC-Easy/test.jsonl          # a part of a data set
    DATA/cmmlu/agronomy/{dev,test}.csv
    DATA/gsm8k/                               # a copy of the hub's own repository

So prompts and measures are the harness's own, and figures compare with those that others publish.
"""

import contextlib
import logging
import re
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import datasets
import lm_eval.tasks
from lm_eval.api import task as harness_task
from lm_eval.tasks import TaskManager

from megatron_7b.errors import ConfigError
from megatron_7b.evaluation.harness.squad_metrics import provide_squad_metrics

logger = logging.getLogger(__name__)

_FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
_LOCAL_PATHS = frozenset({*_FORMATS.values(), "text", "arrow"})
_SPLITS = ("train", "validation", "val", "dev", "test")
_ENDS_OF_SPLITS = ("matched", "mismatched")
"""MNLI has two splits of each kind: `validation_matched`, of the sources that it was trained on, and another."""
_BENCHMARKS = ("glue", "super_glue")
"""Their tasks do not begin with the name of the folder that they are in."""
_SHOWN_NAMES = 5
_SHOWN_CHARACTERS = 80


def find_tasks(names: Sequence[str], include: Sequence[Path]) -> TaskManager:
    """Return an index of tasks that has all that are asked for.

    The folders of the harness whose names begin like a task are read first, all of them only if that is not enough.

    Args:
        names: Of tasks, groups or tags, or paths of YAML files.
        include: Folders with tasks of one's own, which go before the harness's.

    Raises:
        ConfigError: A name is unknown.
    """
    for folder in include:
        if not folder.is_dir():
            raise ConfigError(
                f"{folder} is not a folder", hint="--include-path names a folder with YAML files of tasks"
            )
    provide_squad_metrics()
    own = Path(lm_eval.tasks.__file__).parent
    families = {name.split(separator)[0] for name in names for separator in ("_", "-")}
    homes = [own, *(own / benchmark for benchmark in _BENCHMARKS)]
    likely = [family for name in sorted(families) for home in homes if (family := home / name).is_dir()]
    manager = TaskManager(include_path=[*likely, *include], include_defaults=False)
    missing = _missing(names, manager)
    if missing:
        logger.info("looking for %s among all tasks of the harness, which takes a while", ", ".join(missing))
        manager = TaskManager(include_path=list(include), include_defaults=True)
        missing = _missing(names, manager)
    if missing:
        near = [one for name in missing for one in get_close_matches(name, manager.all_tasks, _SHOWN_NAMES)]
        near += [one for one in manager.all_tasks if any(name.split("_")[0] in one for name in missing)]
        raise ConfigError(
            f"there is no task {', '.join(missing)}",
            hint=f"near it: {', '.join(near[:_SHOWN_NAMES])}"
            if near
            else "--include-path names a folder with your own",
        )
    return manager


def _missing(names: Sequence[str], manager: TaskManager) -> list[str]:
    return [name for name in names if name not in manager.task_index and not Path(name).is_file()]


def check_examples(task: Any, num_fewshot: int | None) -> None:
    """Refuse a task whose data lack the split that examples are taken from.

    Args:
        task: A loaded one.
        num_fewshot: Examples before each question; None: as the task says.

    Raises:
        ConfigError: There are none, or too few.
    """
    config = task.config
    wanted = (config.num_fewshot or 0) if num_fewshot is None else num_fewshot
    rows = len(task.fewshot_docs() or ()) if wanted else 0
    split = config.fewshot_split or config.training_split or config.validation_split
    if wanted and not rows:
        raise ConfigError(
            f"{config.task} takes {wanted} examples from the split {split}, of which its data have no rows",
            hint="add that split, or give --num-fewshot 0",
        )
    most = rows - (split == config.test_split)  # a question is no example of itself
    if wanted > most and task.OUTPUT_TYPE != "loglikelihood_rolling":  # whole texts have no examples before them
        raise ConfigError(
            f"{config.task} takes {wanted} examples from the split {split}, whose {rows:,} rows give at most {most:,}",
            hint=f"--num-fewshot {most} takes fewer",
        )


def check_labels(task: Any, limit: int | None) -> None:
    """Refuse rows whose label is none of the choices: the harness counts these as wrong answers.

    Args:
        task: A loaded one.
        limit: Only so many rows are measured; None: all.

    Raises:
        ConfigError: There is such a row. A test set without its answers, or one whose labels are words.
    """
    if not isinstance(task, harness_task.ConfigurableTask) or task.OUTPUT_TYPE != "multiple_choice":
        return
    if task.multiple_input or callable(task.config.process_results):
        return
    for number, row in enumerate(islice(task.eval_docs, limit)):
        label, choices = task.doc_to_target(row), task.doc_to_choice(row)
        for one in label if isinstance(label, list) else [label]:
            if not (0 <= one < len(choices) if isinstance(one, int) else one in choices):
                raise ConfigError(
                    f"{task.config.task}: row {number} of its data has the label {one!r}, expected 0 to "
                    f"{len(choices) - 1}, or one of {', '.join(map(repr, choices))[:_SHOWN_CHARACTERS]}",
                    hint="labels are numbers, as in the data set on the Hugging Face hub; rows of a test set without "
                    "answers (-1) measure nothing",
                )


@contextlib.contextmanager
def local_data_sets(folder: Path | None, *, may_download: bool) -> Iterator[list[str]]:
    """Have the harness read data sets from a folder, for the duration of a with block.

    Args:
        folder: What holds them; None: there is none.
        may_download: Whether others may be fetched from the hub.

    Yields:
        What is filled with the names of splits that a data set turned out to lack.

    Raises:
        ConfigError: `folder` is none.
    """
    if folder is not None and not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder", hint="--task-data names the folder that has the data sets")
    load = datasets.load_dataset
    lacking: list[str] = []

    def load_local(path: str, name: str | None = None, **options: Any) -> Any:
        if path in _LOCAL_PATHS or Path(path).exists():
            return load(path=path, name=name, **options)
        found = None if folder is None else _find_data_set(folder, path, name)
        if found is not None:
            return _WithEmptySplits(load(**found), lacking)
        if may_download:
            return load(path=path, name=name, **options)
        try:
            return load(path=path, name=name, download_config=datasets.DownloadConfig(local_files_only=True), **options)
        except Exception as error:
            raise ConfigError(
                f"a task reads the data set {path}{'' if name is None else f' ({name})'}, which is not on this machine",
                hint=_where_to_put(folder, path, name),
            ) from error

    replaced = harness_task.datasets
    harness_task.datasets = _Namespace(datasets, load_local)
    try:
        yield lacking
    finally:
        harness_task.datasets = replaced


class _WithEmptySplits(datasets.DatasetDict):
    """Splits of a data set; one that has no file is empty, as not all that a task names are needed."""

    def __init__(self, splits: Any, lacking: list[str]) -> None:
        super().__init__(splits)
        self._lacking = lacking

    def __missing__(self, split: str) -> Any:
        if split not in self._lacking:
            self._lacking.append(split)
        return next(iter(self.values())).select([])


class _Namespace:
    """A module with another `load_dataset`: the harness takes it from there."""

    def __init__(self, module: Any, load: Any) -> None:
        self._module = module
        self.load_dataset = load

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _find_data_set(folder: Path, path: str, name: str | None) -> dict[str, Any] | None:
    """Return how `load_dataset` is called for a data set of the folder; None if it is not there."""
    homes = [home for part in (path, path.rsplit("/", maxsplit=1)[-1]) if (home := folder / part).is_dir()]
    for home in homes:
        if (home / "README.md").is_file() or any(home.glob("*.py")):
            return {"path": str(home), "name": name}
        for place in [home / name] if name is not None and (home / name).is_dir() else [home]:
            files = _files_by_split(place)
            if files:
                kinds = {_FORMATS[file.suffix] for some in files.values() for file in some}
                if len(kinds) > 1:
                    raise ConfigError(f"{place} has files of several formats: {', '.join(sorted(kinds))}")
                return {
                    "path": kinds.pop(),
                    "data_files": {split: list(map(str, some)) for split, some in files.items()},
                }
    return None


def _files_by_split(place: Path) -> dict[str, list[Path]]:
    """Return the files of a folder, its `data` folder and its splits' folders by the split that their names have."""
    folders = [place, place / "data", *(place / split for split in _SPLITS)]
    found: dict[str, list[Path]] = {}
    for file in sorted(file for folder in folders for file in folder.glob("*.*")):
        if file.suffix not in _FORMATS:
            continue
        words = re.split("[-_./]", str(file.relative_to(place)))
        split, end = next((pair for pair in pairwise([*words, ""]) if pair[0] in _SPLITS), (None, ""))
        if split is not None:
            found.setdefault(f"{split}_{end}" if end in _ENDS_OF_SPLITS else split, []).append(file)
    return found


def _where_to_put(folder: Path | None, path: str, name: str | None) -> str:
    home = Path("DATA" if folder is None else folder) / path.rsplit("/", maxsplit=1)[-1] / (name or "")
    return (
        f"put its rows into {home}/SPLIT.jsonl (csv, parquet)"
        + (", and give --task-data DATA" if folder is None else "")
        + "; --allow-download fetches it from the hub"
    )
