"""Raw files to a clean corpus on this machine: all that `megatron-7b data prepare` does without a cluster."""

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_7b.prepare.accounting import RunReport
    from megatron_7b.prepare.running.run import Progress

logger = logging.getLogger(__name__)


def prepare_files(
    inputs: Sequence[str | Path],
    output_folder: str | Path,
    recipe: Sequence[str | Path] = (),
    overrides: Mapping[str, object] | None = None,
    *,
    num_workers: int | None = None,
    overwrite: bool = False,
    keep_work: bool = False,
    progress: "Progress | None" = None,
) -> "RunReport":
    """Clean, deduplicate and split raw files into JSON lines, with a report of every document that was removed.

    A call that was killed is continued by the same call.

    Args:
        inputs: Files, folders or globs: JSONL, parquet, text, html, WARC.
        output_folder: Where the corpus and `report.html` appear.
        recipe: YAML files; the later ones win.
        overrides: Options of the recipe by dotted path, such as `{"language.languages": ["en"]}`.
        num_workers: Processes; None takes one per core.
        overwrite: Replace the result of another recipe.
        keep_work: Keep results on the way, so that a file that is added later costs only itself.
        progress: Told how far it is.

    Returns:
        The account of every stage.

    Raises:
        ConfigError: The recipe is impossible, or an input does not exist.
        DataFormatError: A file is damaged as a whole.
    """
    from megatron_7b.prepare.reading.inputs import find_inputs
    from megatron_7b.prepare.recipe import load_recipe
    from megatron_7b.prepare.running.run import PrepareJob, run_prepare

    job = PrepareJob(
        inputs=find_inputs([str(one) for one in inputs]),
        output_folder=Path(output_folder),
        book=load_recipe(recipe, overrides),
        num_workers=len(os.sched_getaffinity(0)) if num_workers is None else num_workers,
        overwrite=overwrite,
        keep_work=keep_work,
    )
    return run_prepare(job, progress or _Silent())


class _Silent:
    """Progress that nobody sees; warnings are logged."""

    def begin(self, phase: str, total: int) -> None:
        logger.info("%s: %.1f MB of input", phase, total / 1e6)

    def advance(self, size: int) -> None:
        """Show nothing."""

    def warn(self, message: str) -> None:
        logger.warning("%s", message)
