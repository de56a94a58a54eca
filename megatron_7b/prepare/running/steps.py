"""The steps that a document passes on its own, in their order, as a recipe asks for them."""

from collections.abc import Callable, Iterable

from megatron_7b.prepare.document import DocumentStep
from megatron_7b.prepare.reading.extraction import Extraction
from megatron_7b.prepare.recipe import Recipe
from megatron_7b.prepare.rules.gopher import GopherQuality, GopherRepetition
from megatron_7b.prepare.rules.language import LanguageFilter
from megatron_7b.prepare.rules.normalization import Normalization
from megatron_7b.prepare.rules.pii import PiiMasking
from megatron_7b.prepare.rules.web_pages import C4, BadWords, FineWeb

_BUILDERS: dict[str, Callable[[Recipe], DocumentStep | None]] = {
    "extraction": lambda recipe: Extraction(recipe.extraction),
    "normalization": lambda recipe: Normalization(recipe.normalization),
    "language": lambda recipe: LanguageFilter(recipe.language) if recipe.language.identify else None,
    # The cheaper one first; it also has the better words for what is merely short.
    "gopher_quality": lambda recipe: (
        GopherQuality(recipe.quality.gopher_quality) if recipe.quality.gopher_quality else None
    ),
    "gopher_repetition": lambda recipe: (
        GopherRepetition(recipe.quality.gopher_repetition) if recipe.quality.gopher_repetition else None
    ),
    "c4": lambda recipe: C4(recipe.quality.c4) if recipe.quality.c4 else None,
    "fineweb": lambda recipe: FineWeb(recipe.quality.fineweb) if recipe.quality.fineweb else None,
    "bad_words": lambda recipe: BadWords(recipe.quality.bad_words) if recipe.quality.bad_words else None,
    "pii": lambda recipe: PiiMasking(recipe.pii),
}


def build_steps(recipe: Recipe) -> dict[str, DocumentStep]:
    """Return the steps of a recipe by name, in order."""
    built = {name: build(recipe) for name, build in _BUILDERS.items()}
    return {name: step for name, step in built.items() if step is not None}


def find_step_names(recipes: Iterable[Recipe]) -> list[str]:
    """Return the steps that any recipe has, in order: all shards count all of them, so that counts can be added.

    Builds every step once, so that what one of them needs and lacks is reported before the first document is read.
    """
    wanted = {name for recipe in recipes for name in build_steps(recipe)}
    return [name for name in _BUILDERS if name in wanted]
