"""What a run reads: its corpora, checked against their manifests, from where its checkpoint left off."""

import dataclasses
import logging

from megatron_7b.config.schema import RunConfig
from megatron_7b.data import has_split
from megatron_7b.data.upkeep.quick_check import CheckedCorpus, check_corpora, find_prefixes, refuse_damaged
from megatron_7b.objective.objective import Objective, Samples
from megatron_7b.tokenizer import Tokenizer
from megatron_7b.training.agreement import Ranks
from megatron_7b.training.progress import Progress

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class RunData:
    """The samples of a run.

    Attributes:
        train: Continues what the run has read.
        valid: None where there is no validation data.
    """

    train: Samples
    valid: Samples | None


def open_run_data(
    config: RunConfig,
    progress: Progress,
    ranks: Ranks,
    *,
    objective: Objective,
    tokenizer: Tokenizer | None,
) -> RunData:
    """Check and open everything that a run reads.

    Args:
        config: The run; `model.vocab_size` is set.
        progress: How far it has come.
        ranks: All ranks, which share the work of checking.
        objective: What the run trains for.
        tokenizer: Of the corpora; None if it is not known.

    Collective: all ranks.

    Raises:
        ConfigError: The data does not suffice, does not continue what was read, or an option does not fit.
        DataFormatError: A corpus is damaged, is not what its manifest says, or is smaller than one sample.
    """
    checked = _check(config, ranks)
    contents = {one.prefix: one.content for one in checked}
    with ranks.together("opening the corpora"):
        train = objective.open_split(config, "train", tokenizer, contents=contents, reached=progress.reached)
        train.check_end(progress.samples_at_end(config))
        valid = None
        if has_split(config.data, "valid", window_length=objective.window_length(config)):
            valid = objective.open_split(config, "valid", tokenizer, contents={}, reached=None)
    if ranks.is_main:
        _say_what_is_special(train, valid)
    return RunData(train, valid)


def _check(config: RunConfig, ranks: Ranks) -> list[CheckedCorpus]:
    """Check each corpus on one of the ranks; every rank gets all results. Collective: all ranks."""
    with ranks.together("looking for the corpora"):
        prefixes = find_prefixes(config.data)
    full = config.data.verify == "full"
    if full and ranks.is_main:
        logger.info("reading every byte of %d corpora, divided among the ranks", len(prefixes))
    with ranks.together("checking the corpora"):
        own = check_corpora(prefixes[ranks.rank :: ranks.world_size], full=full)
    checked = [one for of_rank in ranks.gather(own) for one in of_rank]
    refuse_damaged(checked)  # the same on every rank
    return checked


def _say_what_is_special(train: Samples, valid: Samples | None) -> None:
    for note in train.notes:
        logger.warning("%s", note)
    if valid is not None and valid.left_out:
        shown = ", ".join(valid.left_out[:10]) + (", …" if len(valid.left_out) > 10 else "")
        logger.warning(
            "validation leaves out %d of %d sets, whose share of data.split holds less than one sample: %s",
            len(valid.left_out), len(valid.left_out) + len(valid.parts), shown,
        )  # fmt: skip
