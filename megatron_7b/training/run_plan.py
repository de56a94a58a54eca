"""What a run will take from each of its sets, before it is started, or what is left of it."""

from bisect import bisect_left
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_7b.config.schema import RunConfig, TrainingConfig
from megatron_7b.data import has_split
from megatron_7b.data.samples.corpus_tokenizer import check_agreement
from megatron_7b.data.samples.plan import SetPlan, plan_sets
from megatron_7b.data.upkeep.quick_check import check_corpora, find_prefixes, refuse_damaged
from megatron_7b.objective import build_objective
from megatron_7b.training.batch_schedule import consumed_samples_after, global_batch_size
from megatron_7b.training.progress import Progress, read_progress


@dataclass(frozen=True, kw_only=True)
class PlannedSet(SetPlan):
    """One set over a whole run, with the steps at which something happens to it."""

    first_epoch_ends_at_step: int | None
    """None if the run ends before."""
    runs_out_at_step: int | None
    """None if the run ends before."""


@dataclass(frozen=True, kw_only=True)
class ValidationSet:
    """What validation reads of one set."""

    prefix: str
    documents: int
    tokens: int


@dataclass(frozen=True, kw_only=True)
class ValidationPlan:
    """What validation reads."""

    samples_per_epoch: int
    sets: list[ValidationSet]
    left_out: list[str]
    """Sets with too little text for one sample."""


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """What a run takes, from its first step on."""

    train_steps: int
    steps_done: int
    samples: int
    """Samples of the whole run."""
    consumed_samples: int
    """Of these, those that it has read already."""
    seq_length: int
    tokens: int
    notes: list[str]
    """What a user should know about how the samples continue what the run has read."""
    sets: list[PlannedSet]
    validation: ValidationPlan | None
    """None if no set has enough documents for one sample."""


def plan_run(config: RunConfig, run_dir: Path | None = None) -> RunPlan:
    """Return what a run will take from each set of its blend. Collective: none.

    Args:
        config: The run, checked with `require_data`.
        run_dir: Plan the rest of the run of this folder, from its newest checkpoint on; None plans a fresh run.

    Raises:
        CheckpointError: The newest checkpoint cannot be read.
        ConfigError: The data does not suffice, or does not continue what was read.
        DataFormatError: A corpus is damaged, or smaller than one sample.
    """
    check_agreement(config.data)
    progress = read_progress(Path(run_dir) / "checkpoints", config) if run_dir is not None else Progress()
    checked = check_corpora(find_prefixes(config.data), full=config.data.verify == "full")
    refuse_damaged(checked)
    contents = {one.prefix: one.content for one in checked}
    dataset = build_objective(config).open_windows(config, "train", contents=contents, reached=progress.reached)
    done = progress.counters
    clock = StepClock(config.training, step=done.step, consumed=done.consumed_samples)
    sets = [
        PlannedSet(
            **asdict(row),
            first_epoch_ends_at_step=clock.find_step(row.first_epoch_ends),
            runs_out_at_step=clock.find_step(row.runs_out),
        )
        for row in plan_sets(dataset, clock.num_samples)
    ]
    return RunPlan(
        train_steps=config.training.train_steps,
        steps_done=done.step,
        samples=clock.num_samples,
        consumed_samples=done.consumed_samples,
        seq_length=config.data.seq_length,
        tokens=done.consumed_tokens + progress.tokens_left(config),
        notes=list(dataset.notes),
        sets=sets,
        validation=_plan_validation(config),
    )


class StepClock:
    """At which step a sample is taken: constant batches, or those of the ramp-up."""

    def __init__(self, training: TrainingConfig, *, step: int = 0, consumed: int = 0) -> None:
        """Count on from where a run is.

        Args:
            training: Batch sizes and number of steps.
            step: Steps that are done.
            consumed: Samples that they took.
        """
        self._full = training.global_batch_size
        self._step = step
        self.num_samples = consumed_samples_after(training.train_steps - step, training, consumed=consumed)
        self._consumed = [consumed]
        """Samples after each step of the ramp-up."""
        while len(self._consumed) <= training.train_steps - step:
            size = global_batch_size(self._consumed[-1], training)
            if size == self._full:
                break
            self._consumed.append(self._consumed[-1] + size)

    def find_step(self, num_samples: int | None) -> int | None:
        """Return the step, counted from 1, that takes sample number `num_samples` of the run, counted from 1 too.

        For samples that are consumed it is the last step that is done; None stays None.
        """
        if num_samples is None:
            return None
        beyond = num_samples - self._consumed[-1]
        if beyond <= 0:
            return self._step + bisect_left(self._consumed, num_samples)
        return self._step + len(self._consumed) - 1 + -(-beyond // self._full)


def _plan_validation(config: RunConfig) -> ValidationPlan | None:
    objective = build_objective(config)
    if not has_split(config.data, "valid", window_length=objective.window_length(config)):
        return None
    valid = objective.open_windows(config, "valid")
    sets = [
        ValidationSet(prefix=part.prefix, documents=part.end_document - part.first_document, tokens=part.num_tokens)
        for part in valid.parts
    ]
    return ValidationPlan(samples_per_epoch=valid.num_samples, sets=sets, left_out=list(valid.left_out))
