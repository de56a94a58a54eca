"""The recipe of a corpus: typed sections, read from YAML and the command line as a run's configuration is.

A file may add a list `per_source`, whose entries change options of the document's sections for some files:

    quality:
      c4: {}
    per_source:
      - files: "code/*"
        quality: {c4: none, fineweb: none}
"""

import dataclasses
import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_7b.config.problems import Problem, raise_problems
from megatron_7b.config.reading import read_settings
from megatron_7b.config.sources import Setting, flatten, merge, read_source
from megatron_7b.prepare.corpus_sections import (
    AugmentationSection,
    DecontaminationSection,
    DuplicatesSection,
    SplitSection,
)
from megatron_7b.prepare.document_sections import (
    ExtractionSection,
    LanguageSection,
    NormalizationSection,
    OutputSection,
    PiiSection,
    QualitySection,
    ReadingSection,
)

COMMAND_LINE = "command line"
SECTIONS_PER_SOURCE = ("reading", "extraction", "normalization", "language", "quality", "pii")
"""What may differ from file to file; the rest is about the corpus."""
_PER_SOURCE = "per_source"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How raw files become a corpus."""

    reading: ReadingSection = field(default_factory=ReadingSection)
    extraction: ExtractionSection = field(default_factory=ExtractionSection)
    normalization: NormalizationSection = field(default_factory=NormalizationSection)
    language: LanguageSection = field(default_factory=LanguageSection)
    quality: QualitySection = field(default_factory=QualitySection)
    pii: PiiSection = field(default_factory=PiiSection)
    duplicates: DuplicatesSection = field(default_factory=DuplicatesSection)
    decontamination: DecontaminationSection = field(default_factory=DecontaminationSection)
    augmentation: AugmentationSection = field(default_factory=AugmentationSection)
    split: SplitSection = field(default_factory=SplitSection)
    output: OutputSection = field(default_factory=OutputSection)


@dataclass(frozen=True)
class RecipeBook:
    """The recipe, and what differs for some files."""

    recipe: Recipe
    per_source: tuple[tuple[tuple[str, ...], Recipe], ...] = ()
    """Patterns of paths, and the whole recipe for the files that match one of them."""

    def find_entry(self, source: str) -> tuple[int | None, Recipe]:
        """Return the recipe of a file: that of the last entry with a pattern that matches the path that the user gave.

        Returns:
            The entry's index, None where no entry matches, and the recipe.
        """
        for index, (patterns, recipe) in reversed(list(enumerate(self.per_source))):
            if any(fnmatch.fnmatchcase(source, pattern) for pattern in patterns):
                return index, recipe
        return None, self.recipe


def load_recipe(
    sources: Sequence[str | Path], overrides: Mapping[str, object] | None = None, problems: Sequence[Problem] = ()
) -> RecipeBook:
    """Build a recipe from YAML files, later ones winning, and overrides by dotted path.

    Raises:
        ConfigError: Everything that is wrong with it, and `problems`, in one message.
    """
    layers = [read_source(source, Recipe).settings for source in sources]
    # The command line wins over everything, also over what a file says of some sources.
    last = flatten(overrides or {}, COMMAND_LINE, root=Recipe)
    settings = merge([*layers, last])
    entries = settings.pop(_PER_SOURCE, None)
    recipe, found = read_settings(settings, Recipe)
    found = [*problems, *found]
    variants: list[tuple[tuple[str, ...], Recipe]] = []
    for number, entry in enumerate(_as_list(entries, found), start=1):
        changes, patterns = _read_entry(entry, f"{_PER_SOURCE}[{number}]", found)
        variant, faults = read_settings(merge([settings, changes, last]), Recipe)
        found += [fault for fault in faults if fault.path in changes]
        variants.append((patterns, variant))
    book = RecipeBook(recipe, tuple(variants))
    if not found:
        found += find_problems(recipe)
        for patterns, variant in variants:
            found += [
                dataclasses.replace(problem, origin=f"{_PER_SOURCE} {' '.join(patterns)}")
                for problem in find_problems(variant)
                if problem not in find_problems(recipe)
            ]
    raise_problems(found)
    return book


def recipe_to_dict(recipe: Recipe) -> dict[str, object]:
    """Return all of a recipe as nested dicts of plain values."""
    return {name: _plain(value) for name, value in dataclasses.asdict(recipe).items()}


def book_to_dict(book: RecipeBook) -> dict[str, object]:
    """Return a recipe with what differs per source, as plain values: what the journal is keyed by."""
    tree = recipe_to_dict(book.recipe)
    if book.per_source:
        tree[_PER_SOURCE] = [
            {"files": list(patterns), **recipe_to_dict(recipe)} for patterns, recipe in book.per_source
        ]
    return tree


def find_problems(recipe: Recipe) -> list[Problem]:
    """Return the problems of values that are out of range or impossible together."""
    return [
        *_out_of_range(recipe, ("reading.max_bad_fraction", "language.min_score"), 0.0, 1.0),
        *_out_of_range(recipe, ("split.validation", "split.test"), 0.0, 1.0),
        *_corpus_problems(recipe),
        *_out_of_range(recipe, ("reading.shard_megabytes",), 0.01, None),
        *_out_of_range(recipe, ("language.characters",), 0, None),
    ]


def _corpus_problems(recipe: Recipe) -> Iterator[Problem]:
    """Yield the problems of the corpus's sections: values that are out of range or impossible together."""
    ranges: dict[str, tuple[float, float]] = {
        "duplicates.similarity": (0.1, 1.0),
        "duplicates.shingle_words": (1, 100),
        "duplicates.num_hashes": (16, 4096),
        "decontamination.min_words": (1, recipe.decontamination.ngram_words),
        "augmentation.share": (0, 1),
        "augmentation.temperature": (0, 2),
        "augmentation.concurrency": (1, 4096),
        "augmentation.retries": (0, 100),
        "augmentation.timeout_seconds": (1, 86_400),
        "augmentation.join_characters": (1, 10**9),
    }
    for path, (low, high) in ranges.items():
        section, name = path.split(".")
        value = getattr(getattr(recipe, section), name)
        if not low <= value <= high:
            yield Problem(path, value, f"must be from {low:g} to {high:g}")
    if recipe.split.validation + recipe.split.test > 1:
        yield Problem(
            "split.test", recipe.split.test, f"with split.validation {recipe.split.validation:g} more than all"
        )
    augmentation = recipe.augmentation
    if augmentation.method == "rewrite" and "{text}" not in augmentation.prompt:
        yield Problem("augmentation.prompt", augmentation.prompt, "must say where the document goes: {text}")
    if augmentation.max_tokens is not None and augmentation.max_tokens < 1:
        yield Problem("augmentation.max_tokens", augmentation.max_tokens, "must be at least 1, or none")
    needed = {"rewrite": ("endpoint", "model"), "back_translation": ("endpoint", "model"), "callable": ("callable",)}
    for name in needed.get(augmentation.method, ()):
        if not getattr(augmentation, name):
            yield Problem(f"augmentation.{name}", None, f"needed for augmentation.method {augmentation.method}")


def _plain(value: object) -> object:
    """Tuples as lists, at any depth: as YAML and JSON have them."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _out_of_range(recipe: Recipe, paths: Sequence[str], low: float, high: float | None) -> list[Problem]:
    found = []
    for path in paths:
        section, name = path.split(".")
        value = getattr(getattr(recipe, section), name)
        if value < low or (high is not None and value > high):
            allowed = f"must be at least {low:g}" if high is None else f"must be from {low:g} to {high:g}"
            found.append(Problem(path, value, allowed))
    return found


def _as_list(setting: Setting | None, problems: list[Problem]) -> list[object]:
    if setting is None:
        return []
    if isinstance(setting.value, list):
        return list(setting.value)
    problems.append(Problem(_PER_SOURCE, setting.value, "expected a list of entries with `files`", setting.origin))
    return []


def _read_entry(entry: object, where: str, problems: list[Problem]) -> tuple[dict[str, Setting], tuple[str, ...]]:
    """Return the settings of one entry of `per_source`, and its patterns."""
    if not isinstance(entry, Mapping) or not entry.get("files"):
        problems.append(Problem(where, entry, "expected a mapping with `files` (a pattern, or a list) and sections"))
        return {}, ()
    files = entry["files"]
    patterns = (files,) if isinstance(files, str) else tuple(str(one) for one in files)
    changes = flatten({key: value for key, value in entry.items() if key != "files"}, where, root=Recipe)
    for path in list(changes):
        if path.split(".")[0] not in SECTIONS_PER_SOURCE:
            allowed = ", ".join(SECTIONS_PER_SOURCE)
            problems.append(Problem(path, changes.pop(path).value, f"may not differ per source; {allowed} may", where))
    return changes, patterns
