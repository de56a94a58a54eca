"""What tasks have given; needs no torch."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_7b.runtime.rescue import write_or_rescue


@dataclass(frozen=True)
class Measure:
    """One figure of a task.

    Attributes:
        task: Name of the task or group.
        version: Of the task.
        shots: Examples before each question; None for groups.
        name: Of the measure, such as `acc_norm`.
        filter: What picked answers out of texts; empty: nothing did.
        value: The figure.
        error: Its standard error; None if the harness gives none.
    """

    task: str
    version: str
    shots: int | None
    name: str
    filter: str
    value: float
    error: float | None

    @property
    def title(self) -> str:
        """Measure, and filter if there is one: `exact_match (strict-match)`."""
        return f"{self.name} ({self.filter})" if self.filter else self.name

    @property
    def path(self) -> str:
        """Task, measure and filter in one word: `gsm8k/exact_match/strict-match`."""
        return "/".join(part for part in (self.task, self.name, self.filter) if part)


@dataclass(frozen=True)
class TaskResults:
    """What `lm_eval.simple_evaluate` returns.

    Attributes:
        content: That, as JSON can hold it: results, configurations of tasks, versions, and samples if they were asked
            for.
    """

    content: Mapping[str, Any]

    def measures(self) -> Iterator[Measure]:
        """Yield all figures, task by task."""
        groups = self.content.get("groups", {})
        for task, figures in {**self.content["results"], **groups}.items():
            for key, value in figures.items():
                name, _, picked = key.partition(",")
                if not picked or name.endswith("_stderr") or not isinstance(value, int | float):
                    continue
                error = figures.get(f"{name}_stderr,{picked}")
                yield Measure(
                    task=task,
                    version=str(self.content.get("versions", {}).get(task, "")),
                    shots=self.content.get("n-shot", {}).get(task),
                    name=name,
                    filter="" if picked == "none" else picked,
                    value=float(value),
                    error=float(error) if isinstance(error, int | float) else None,
                )

    def write(self, file: Path) -> None:
        """Write everything as JSON; raises as `write_or_rescue`."""
        write_or_rescue(file, lambda stream: json.dump(self.content, stream, indent=1, ensure_ascii=False, default=str))
