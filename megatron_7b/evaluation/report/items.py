"""The questions of an evaluation one by one, as lm-evaluation-harness logs them."""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_7b.errors import ConfigError, DataFormatError


@dataclass(frozen=True, kw_only=True)
class Item:
    """One question and what a model made of it.

    Attributes:
        task: Name of its task.
        key: What it is found by in another evaluation of the same task.
        question: What the model was given.
        answers: Of a choice: the texts that it chose from; otherwise empty.
        log_likelihoods: Of a choice: of each of them.
        target: The right answer: which of them, or a text.
        written: What the model wrote, if it wrote a text.
        values: By measure and filter, as the mean of which the task reports; numbers only.
    """

    task: str
    key: str
    question: str
    answers: tuple[str, ...]
    log_likelihoods: tuple[float, ...]
    target: int | str
    written: str | None
    values: Mapping[str, float]

    @property
    def chosen(self) -> int | None:
        """Which answer the model finds likeliest; None if there is no choice."""
        scores = self.log_likelihoods
        return max(range(len(scores)), key=scores.__getitem__) if len(scores) > 1 else None

    @property
    def shares(self) -> tuple[float, ...]:
        """Likelihoods of the answers, which add up to 1."""
        highest = max(self.log_likelihoods)
        weights = [math.exp(score - highest) for score in self.log_likelihoods]
        return tuple(weight / sum(weights) for weight in weights)

    @property
    def loss(self) -> float | None:
        """-ln of the share of the right answer; None if there is no choice."""
        if self.chosen is None or not isinstance(self.target, int) or not 0 <= self.target < len(self.shares):
            return None
        return -math.log(max(self.shares[self.target], 1e-300))


def read_results(file: Path) -> dict[str, Any]:
    """Read what `evaluate --tasks --output` wrote.

    Raises:
        ConfigError: It is not there.
        DataFormatError: It is something else.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise DataFormatError(f"{file} is not JSON: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("results"), dict):
        raise DataFormatError(
            f"{file} holds no results of tasks", hint="`megatron-7b evaluate --tasks … --output F.json` writes them"
        )
    return content


def items_of(content: Mapping[str, Any]) -> Iterator[Item]:
    """Yield the questions, each once however many filters a task has; none if they were not logged."""
    for task, samples in content.get("samples", {}).items():
        by_question: dict[str, list[Mapping[str, Any]]] = {}
        for sample in samples:
            by_question.setdefault(str(sample["doc_id"]), []).append(sample)
        for of_one in by_question.values():
            yield _item(task, of_one)


def _item(task: str, samples: list[Mapping[str, Any]]) -> Item:
    first = samples[0]
    values: dict[str, float] = {}
    for sample in samples:
        for measure in sample["metrics"]:
            value = sample.get(measure)
            if isinstance(value, int | float):
                values[measure if sample["filter"] == "none" else f"{measure} ({sample['filter']})"] = float(value)
    arguments, answers = first["arguments"], first["resps"]
    scores = [answer[0] for answer in answers if isinstance(answer[0], list | tuple)]
    is_choice = len(scores) == len(answers)
    return Item(
        task=task,
        key=f"{first['doc_id']}/{first['doc_hash']}",
        question=str(arguments[0][0]),
        answers=tuple(str(one[1]) for one in arguments) if is_choice and len(arguments[0]) > 1 else (),
        log_likelihoods=tuple(float(score[0]) for score in scores) if is_choice else (),
        target=first["target"] if isinstance(first["target"], int) else str(first["target"]),
        written=None if is_choice else str(answers[0][0]),
        values=values,
    )
