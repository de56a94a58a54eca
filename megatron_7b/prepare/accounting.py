"""Where every document went: counts per stage that must add up, and what the report is made of."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

SHORTEST_TIMED = 0.1
"""Seconds below which a rate says more about the clock than about the work."""


@dataclass(slots=True)
class StageCount:
    """What one stage did to the documents that it was given."""

    name: str
    documents_in: int = 0
    kept: int = 0
    added: int = 0
    """Documents that the stage made; they are in `kept` or `removed`, not in `documents_in`."""
    removed: Counter[str] = field(default_factory=Counter)
    """Documents dropped, by reason."""
    quarantined: int = 0
    """Records that could not be read at all."""
    changes: Counter[str] = field(default_factory=Counter)
    """What was changed inside of documents, such as masked addresses, by kind; documents are not counted here."""
    characters_in: int = 0
    characters_kept: int = 0
    seconds: float = 0.0
    """Of one core, summed over the workers; of a batch step, which mostly waits for others, by the clock."""
    peak_memory: int = 0
    """Most resident bytes of a worker at the end of a batch of this stage."""

    @property
    def characters_per_second(self) -> float | None:
        """Speed on one core; None where the stage was over too soon to be timed."""
        return self.characters_in / self.seconds if self.seconds >= SHORTEST_TIMED else None

    def check(self) -> None:
        """Nothing may be lost.

        Raises:
            AssertionError: Documents in and out differ: a defect of this stage.
        """
        given = self.documents_in + self.added
        out = self.kept + self.removed.total() + self.quarantined
        if given != out:
            raise AssertionError(
                f"stage {self.name} lost count of its documents: {self.documents_in} in and {self.added} added, but "
                f"{self.kept} kept, {self.removed.total()} removed and {self.quarantined} quarantined"
            )

    def merge(self, other: "StageCount") -> None:
        """Add the count of the same stage on other documents."""
        assert other.name == self.name, f"{other.name} is not {self.name}"
        self.documents_in += other.documents_in
        self.kept += other.kept
        self.added += other.added
        self.removed.update(other.removed)
        self.quarantined += other.quarantined
        self.changes.update(other.changes)
        self.characters_in += other.characters_in
        self.characters_kept += other.characters_kept
        self.seconds += other.seconds
        self.peak_memory = max(self.peak_memory, other.peak_memory)

    def to_json(self) -> dict[str, Any]:
        """Return it as plain data, reasons with the most documents first."""
        return {
            **_fields(self),
            "removed": dict(self.removed.most_common()),
            "changes": dict(self.changes.most_common()),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "StageCount":
        """Return the inverse of `to_json`."""
        return cls(**{**data, "removed": Counter(data["removed"]), "changes": Counter(data["changes"])})


@dataclass(slots=True)
class Distributions:
    """What the documents look like, as counts that can be added up."""

    lengths: dict[str, Counter[int]] = field(default_factory=dict)
    """`read` and `kept`: documents by bit length of their number of characters (k means 2**(k-1) to 2**k - 1)."""
    languages: Counter[str] = field(default_factory=Counter)
    """Documents by the language that was found, before any is dropped for it."""
    sources: dict[str, Counter[str]] = field(default_factory=dict)
    """Per input file: documents `read` and `kept`, and `quarantined` records."""
    splits: dict[str, Counter[str]] = field(default_factory=dict)
    """`train`, `validation`, `test`: `documents` and `characters`."""
    duplicate_groups: dict[str, Counter[int]] = field(default_factory=dict)
    """`exact` and `near`: groups of equal documents by their size (the one that stays included)."""

    def merge(self, other: "Distributions") -> None:
        """Add what other documents look like."""
        self.languages.update(other.languages)
        for mine, others in (
            (self.lengths, other.lengths),
            (self.sources, other.sources),
            (self.splits, other.splits),
            (self.duplicate_groups, other.duplicate_groups),
        ):
            for name, counts in others.items():
                mine.setdefault(name, Counter()).update(counts)  # type: ignore[arg-type]

    def to_json(self) -> dict[str, Any]:
        """Return it as plain data; JSON makes the integer keys texts."""
        return _fields(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Distributions":
        """Return the inverse of `to_json`, also after the integers became texts."""

        def by_number(counts: Mapping[str, Mapping[Any, int]]) -> dict[str, Counter[int]]:
            return {name: Counter({int(key): n for key, n in one.items()}) for name, one in counts.items()}

        return cls(
            lengths=by_number(data["lengths"]),
            languages=Counter(data["languages"]),
            sources={name: Counter(counts) for name, counts in data["sources"].items()},
            splits={name: Counter(counts) for name, counts in data["splits"].items()},
            duplicate_groups=by_number(data["duplicate_groups"]),
        )


@dataclass(slots=True)
class RunReport:
    """All of a run: `report.json`, and what `report.html` is drawn from."""

    version: str
    """Of this project."""
    command: list[str]
    recipe: dict[str, Any]
    """As `recipe_to_dict` gives it."""
    inputs: list[dict[str, Any]]
    """`path` and `bytes` of each file."""
    stages: list[StageCount]
    """In the order in which documents pass them."""
    distributions: Distributions
    wall_seconds: float
    workers: int
    key: str = ""
    """Of the recipe, the inputs and the versions: the same command finds its work done by it."""

    def check(self) -> None:
        """Check that every stage adds up, and that each gets what the one before it kept.

        Raises:
            AssertionError: Documents were lost, or counted twice: a defect.
        """
        for stage in self.stages:
            stage.check()
        for before, after in zip(self.stages, self.stages[1:], strict=False):
            if before.kept != after.documents_in:
                raise AssertionError(
                    f"{before.kept} documents left stage {before.name}, {after.documents_in} came into {after.name}"
                )

    def to_json(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {
            **_fields(self),
            "stages": [stage.to_json() for stage in self.stages],
            "distributions": self.distributions.to_json(),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "RunReport":
        """Return the inverse of `to_json`."""
        return cls(
            **{
                **data,
                "stages": [StageCount.from_json(stage) for stage in data["stages"]],
                "distributions": Distributions.from_json(data["distributions"]),
            }
        )


@dataclass(frozen=True, slots=True)
class Sample:
    """A document that a stage dropped, kept for reading: a line of `dropped/STAGE.jsonl`."""

    stage: str
    reason: str
    detail: str
    source: str
    position: int
    text: str
    """Its first characters."""


def merge_stages(parts: Iterable[Iterable[StageCount]]) -> list[StageCount]:
    """Add up the counts of several shards, stage by stage, in the order of their first appearance."""
    merged: dict[str, StageCount] = {}
    for part in parts:
        for stage in part:
            if stage.name in merged:
                merged[stage.name].merge(stage)
            else:
                merged[stage.name] = StageCount(stage.name)
                merged[stage.name].merge(stage)
    return list(merged.values())


def _fields(record: StageCount | Distributions | RunReport) -> dict[str, Any]:
    """Return its fields by name; `dataclasses.asdict` would count the items of a Counter instead of copying it."""
    return {one.name: getattr(record, one.name) for one in fields(record)}
