"""The README.md of an export: what evaluations have found, for people, and in the form that the Hugging Face hub reads.

Source: https://github.com/huggingface/hub-docs/blob/main/modelcard.md, the section `model-index`.
"""

import datetime as dt
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_7b.checkpoint.evaluations import WEIGHTS, kept_evaluations
from megatron_7b.errors import ConfigError, DataFormatError

CARD_FILE = "README.md"
_PIPELINES = {
    "sequence_classification": "text-classification",
    "token_classification": "token-classification",
    "question_answering": "question-answering",
}
_COUNTS = frozenset(
    {
        "tokens",
        "records",
        "texts",
        "documents",
        "bytes",
        "words",
        "problems",
        "programs",
        "new_tokens",
        "queries",
        "nats",
    }
)
"""What `--json` prints beside figures."""


@dataclass(frozen=True)
class CardFigure:
    """One figure of an evaluation.

    Attributes:
        task: What was measured on.
        measure: Such as `acc_norm`, or `exact_match (strict-match)`.
        value: The figure.
        error: Its standard error; None if it is not known.
        date: When it was measured.
        command: What measured it; None if that is not known.
    """

    task: str
    measure: str
    value: float
    error: float | None
    date: dt.date
    command: str | None


def kept_card_figures(checkpoint: Path, weights: str, report: Callable[[str, str], None]) -> list[CardFigure]:
    """Read what `evaluate --keep` has kept in a checkpoint; of a figure that is there twice, the newest.

    Args:
        checkpoint: Its folder.
        weights: Hash of its weights; what was measured on others is left out.
        report: Takes what was left out, and why.
    """
    found: dict[tuple[str, str], CardFigure] = {}
    for file in kept_evaluations(checkpoint):
        try:
            content = _content(file)
            figures = _figures(file)
        except (ConfigError, DataFormatError) as error:
            report("warning", f"left out of the model card: {error}")
            continue
        if content.get(WEIGHTS) != weights:
            report("warning", f"left out of the model card: {file} was measured on other weights than these")
            continue
        found |= {(figure.task, figure.measure): figure for figure in figures}
    return list(found.values())


def read_card_figures(files: Sequence[Path], weights: str | None = None) -> list[CardFigure]:
    """Read what `evaluate --output` has written, or the object that `evaluate --json` prints.

    Args:
        files: In the order of the card.
        weights: Hash of the weights that they should be of; files that do not say so are taken as they are.

    Raises:
        ConfigError: A file cannot be read, is of other weights, or the same figure is in two of them.
        DataFormatError: It holds no figures.
    """
    found: dict[tuple[str, str], tuple[Path, CardFigure]] = {}
    for file in files:
        of = _content(file).get(WEIGHTS)
        if None not in (of, weights) and of != weights:
            raise ConfigError(
                f"{file} was measured on other weights than those of the checkpoint that is exported",
                hint="measure it again with `megatron-7b evaluate`, or export the checkpoint that was measured",
            )
        figures = _figures(file)
        if not figures:
            raise DataFormatError(
                f"{file} holds no figures", hint="`megatron-7b evaluate … --output F.json` writes a file of them"
            )
        for figure in figures:
            key = (figure.task, figure.measure)
            if key in found:
                raise ConfigError(f"{figure.measure} of {figure.task} is in {found[key][0]} and in {file}")
            found[key] = (file, figure)
    return [figure for _, figure in found.values()]


def write_model_card(folder: Path, name: str, head: str | None, figures: Sequence[CardFigure]) -> None:
    """Write the card of a model.

    Args:
        folder: Of the export.
        name: Of the model.
        head: What it has in the place of an output layer; None or "none": it writes text.
        figures: In the order of the card.
    """
    pipeline = _PIPELINES.get(head or "", "text-generation")
    tasks = list(dict.fromkeys(figure.task for figure in figures))
    index = {
        "name": name,
        "results": [
            {
                "task": {"type": pipeline},
                "dataset": {"name": task, "type": task},
                "metrics": [
                    {"type": one.measure, "value": one.value, "name": one.measure}
                    for one in figures
                    if one.task == task
                ],
            }
            for task in tasks
        ],
    }
    metadata = {"library_name": "transformers", "pipeline_tag": pipeline, "model-index": [index]}
    front = yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)
    (folder / CARD_FILE).write_text(f"---\n{front}---\n\n{_text(name, figures)}", encoding="utf-8")


def _text(name: str, figures: Sequence[CardFigure]) -> str:
    lines = [f"# {name}", "", "## Evaluation", "", "| task | measure | value | ± standard error | date |"]
    lines.append("|---|---|---:|---:|---|")
    for one in figures:
        error = "" if one.error is None else f"{one.error:.4f}"
        cells = [_cell(one.task), _cell(one.measure), f"{one.value:.4f}", error, one.date.isoformat()]
        lines.append(f"| {' | '.join(cells)} |")
    commands = list(dict.fromkeys(one.command for one in figures if one.command))
    if commands:
        lines += ["", "Measured on the checkpoint that this model was exported from, by:", "", "```", *commands, "```"]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _content(file: Path) -> dict[str, Any]:
    """Return the object that a file holds; empty if it holds something else."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise DataFormatError(f"{file} is not JSON: {error}") from error
    return content if isinstance(content, dict) else {}


def _figures(file: Path) -> list[CardFigure]:
    content = _content(file)
    when = dt.datetime.fromtimestamp(file.stat().st_mtime, dt.UTC).date()
    if _is_number(content.get("date")):
        when = dt.datetime.fromtimestamp(content["date"], dt.UTC).date()
    command = content["command"] if isinstance(content.get("command"), str) else None
    results = content.get("results")
    if not isinstance(results, dict):
        own = {key: value for key, value in content.items() if key not in _COUNTS and _is_number(value)}
        return [CardFigure(file.stem, key, float(value), None, when, command) for key, value in own.items()]
    found = []
    for task, values in {**results, **(content.get("groups") or {})}.items():
        for key, value in values.items():
            name, _, picked = key.partition(",")
            if not picked or name.endswith("_stderr") or not _is_number(value):
                continue
            spread = values.get(f"{name}_stderr,{picked}")
            title = name if picked == "none" else f"{name} ({picked})"
            known = float(spread) if _is_number(spread) else None
            found.append(CardFigure(str(task), title, float(value), known, when, command))
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
