"""Rules for the batch and the data of a run."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import cast

from megatron_7b.config.blend import split_blend
from megatron_7b.config.model_rules import obstacle_to_transformer_engine
from megatron_7b.config.options import get_value
from megatron_7b.config.problems import Problem, nearest
from megatron_7b.config.profile_steps import read_profile_steps
from megatron_7b.config.rule import LAYOUT, Case, Rule, adder_to, nearest_divisors, nearest_multiples

RULES: list[Rule] = []
rule = adder_to(RULES)

FILE_RULES: list[Rule] = []
"""Rules that look at the file system: for a run that is about to start."""
file_rule = adder_to(FILE_RULES)

# Loss --------------------------------------------------------------------------------------------------------------


@rule(
    "runtime.cross_entropy_impl",
    "runtime.device",
    "model.transformer_impl",
    "model.architecture",
    "finetune.label_smoothing",
    "distillation.teacher",
    "distillation.cached_logits",
)
def _losses_from_all_logits_are_of_plain_decoders(case: Case) -> Iterator[Problem]:
    config, path = case.config, "runtime.cross_entropy_impl"
    impl = config.runtime.cross_entropy_impl
    if impl == "te" and (obstacle := obstacle_to_transformer_engine(case)):
        yield case.problem(path, f"needs Transformer Engine; {obstacle}")
    elif impl in ("full", "te") and config.cross_entropy_impl(has_transformer_engine=True) != impl:
        kind = config.model.traits.kind
        reason = "with finetune.label_smoothing or a teacher" if kind == "decoder" else f"of kind {kind}"
        yield case.problem(path, f"must be auto or chunked for a model {reason}")


# Batch -------------------------------------------------------------------------------------------------------------


@rule("training.global_batch_size", "training.micro_batch_size", *LAYOUT)
def _global_batch_splits_evenly(case: Case) -> Iterator[Problem]:
    batch, unit = case.config.training.global_batch_size, case.samples_per_microbatch
    if batch % unit:
        yield case.problem(
            "training.global_batch_size",
            f"must be a multiple of micro_batch_size * data-parallel ranks = {case.config.training.micro_batch_size} * "
            f"{case.data_parallel_size} = {unit}; nearest: {nearest_multiples(unit, batch)}",
        )


INTERLEAVING = (
    "training.micro_batch_size",
    "parallel.virtual_pipeline_model_parallel_size",
    *LAYOUT,
)


def _interleaving_unit(case: Case) -> int | None:
    """Return what a global batch must be a multiple of under the interleaved schedule [samples], else None."""
    parallel = case.config.parallel
    if (parallel.virtual_pipeline_model_parallel_size or 1) == 1:
        return None
    return case.samples_per_microbatch * parallel.pipeline_model_parallel_size


@rule("training.global_batch_size", *INTERLEAVING)
def _interleaving_fills_its_groups(case: Case) -> Iterator[Problem]:
    batch, unit = case.config.training.global_batch_size, _interleaving_unit(case)
    if unit and batch % case.samples_per_microbatch == 0 and batch % unit:
        yield case.problem(
            "training.global_batch_size",
            f"makes {batch // case.samples_per_microbatch} microbatches; the interleaved schedule needs a multiple of "
            f"pipeline_model_parallel_size = {case.config.parallel.pipeline_model_parallel_size}: "
            f"{nearest_multiples(unit, batch)} samples",
        )


@rule("training.rampup_batch_size", "training.global_batch_size", *INTERLEAVING)
def _rampup_reaches_the_global_batch(case: Case) -> Iterator[Problem]:
    training, path = case.config.training, "training.rampup_batch_size"
    if training.rampup_batch_size is None:
        return
    start, increment, samples = training.rampup_batch_size
    unit = _interleaving_unit(case) or case.samples_per_microbatch
    if min(start, increment, samples) < 1:
        yield case.problem(path, "start size, increment and samples must all be at least 1")
    elif start > training.global_batch_size:
        yield case.problem(path, f"must start below training.global_batch_size = {training.global_batch_size}")
    elif (training.global_batch_size - start) % increment:
        yield case.problem(
            path,
            f"steps of {increment} from {start} miss training.global_batch_size = {training.global_batch_size}; "
            f"nearest increment: {nearest_divisors(training.global_batch_size - start, increment)}",
        )
    elif start % unit or (increment % unit and start != training.global_batch_size):
        yield case.problem(path, f"start size and increment must be multiples of {unit} samples, as every batch must")


# Profile -----------------------------------------------------------------------------------------------------------


@rule("telemetry.profile_steps", "training.train_steps")
def _profiled_steps_are_steps_of_the_run(case: Case) -> Iterator[Problem]:
    path, text = "telemetry.profile_steps", case.config.telemetry.profile_steps
    if text is None:
        return
    try:
        steps = read_profile_steps(text)
    except ValueError as error:
        yield case.problem(path, str(error))
        return
    if steps[-1] > case.config.training.train_steps:
        yield case.problem(path, f"the run ends with step {case.config.training.train_steps} (training.train_steps)")


@rule("telemetry.profile_ranks")
def _profiled_ranks_are_ranks_of_the_run(case: Case) -> Iterator[Problem]:
    ranks, size = case.config.telemetry.profile_ranks, case.world_size
    wrong = [rank for rank in ranks if rank < 0 or (size is not None and rank >= size)]
    if not ranks:
        yield case.problem("telemetry.profile_ranks", "name at least one rank: 0")
    elif wrong:
        whole = "" if size is None else f" to {size - 1}"
        yield case.problem("telemetry.profile_ranks", f"there is no rank {wrong[0]}: ranks are 0{whole}")


# Data --------------------------------------------------------------------------------------------------------------


@rule("training.early_stop_validations", "checkpoint.keep_best")
def _better_has_a_meaning(case: Case) -> Iterator[Problem]:
    if case.config.training.early_stop_validations and case.config.checkpoint.keep_best is None:
        yield case.problem(
            "training.early_stop_validations", "needs checkpoint.keep_best, which says what is better: validation_loss"
        )


@rule("data.split", "data.valid")
def _split_is_shares(case: Case) -> Iterator[Problem]:
    try:
        shares = [float(share) for share in case.config.data.split.split(",")]
    except ValueError:
        shares = []
    if not 1 <= len(shares) <= 3 or not all(math.isfinite(share) and share >= 0 for share in shares) or not shares[0]:
        yield case.problem(
            "data.split", "expected shares of training, validation and test such as 98,2,0 or 0.95,0.05; the first > 0"
        )


@rule("data.reset_position_ids", "data.reset_attention_mask")
def _positions_restart_only_within_documents(case: Case) -> Iterator[Problem]:
    data = case.config.data
    if data.reset_position_ids and not data.reset_attention_mask:
        yield case.problem(
            "data.reset_position_ids",
            "needs data.reset_attention_mask True: rotary embeddings see distances only, and across documents they "
            "would contradict such positions",
        )


def _check_blend(case: Case, path: str) -> Iterator[Problem]:
    entries = cast(tuple[str, ...], get_value(case.config, path))
    if not entries:
        return
    try:
        blend = split_blend(entries)
    except ValueError as error:
        yield case.problem(path, str(error))
        return
    for part in blend:
        if part.prefix.endswith((".bin", ".idx")):
            yield case.problem(path, f"give the prefix that both files share: {part.prefix[:-4]}")


@rule("data.train")
def _training_blend_is_well_formed(case: Case) -> Iterator[Problem]:
    yield from _check_blend(case, "data.train")


@rule("data.valid")
def _validation_blend_is_well_formed(case: Case) -> Iterator[Problem]:
    yield from _check_blend(case, "data.valid")


@rule("data.max_epochs", "data.train")
def _every_set_has_its_bound(case: Case) -> Iterator[Problem]:
    bounds, entries = case.config.data.max_epochs, case.config.data.train
    if any(bound < 0 for bound in bounds):
        yield case.problem("data.max_epochs", "must not be negative; 0 is no bound")
    elif entries and len(bounds) > 1 and not list(_check_blend(case, "data.train")):
        num_sets = len(split_blend(entries))
        if len(bounds) != num_sets:
            yield case.problem("data.max_epochs", f"expected one number, or one for each of the {num_sets} sets")


def _check_files(case: Case, path: str) -> Iterator[Problem]:
    entries = cast(tuple[str, ...], get_value(case.config, path))
    if not entries or list(_check_blend(case, path)):
        return
    for part in split_blend(entries):
        prefix = part.prefix
        missing = [f"{prefix}{suffix}" for suffix in (".bin", ".idx") if not Path(f"{prefix}{suffix}").is_file()]
        if missing:
            yield case.problem(path, f"no file {' nor '.join(missing)}{_guess_corpus(prefix)}")


def _guess_corpus(prefix: str) -> str:
    """Name the corpus beside a prefix that has no files, or that lacks one, which is meant most probably."""
    folder, name = Path(prefix).parent, Path(prefix).name
    whole = sorted(index.stem for index in folder.glob("*.idx") if index.with_suffix(".bin").is_file())
    begin_alike = [stem for stem in whole if stem.startswith(f"{name}_") and stem != name]
    guess = begin_alike[0] if begin_alike else nearest(name, [stem for stem in whole if stem != name])
    return f"; did you mean {folder / guess}?" if guess else ""


@file_rule("data.train")
def _training_needs_a_corpus(case: Case) -> Iterator[Problem]:
    if not case.config.data.train:
        yield case.problem(
            "data.train", "name the corpus: the prefix that `megatron-7b preprocess` wrote, or 0.7 A 0.3 B"
        )
    yield from _check_files(case, "data.train")


@file_rule("data.valid")
def _validation_files_exist(case: Case) -> Iterator[Problem]:
    yield from _check_files(case, "data.valid")


@file_rule("data.tokenizer")
def _tokenizer_exists(case: Case) -> Iterator[Problem]:
    tokenizer = case.config.data.tokenizer
    if tokenizer not in (None, "bytes") and not Path(tokenizer or "").exists():
        yield case.problem("data.tokenizer", "no such file or folder")


@file_rule("checkpoint.initialize_from")
def _initial_weights_exist(case: Case) -> Iterator[Problem]:
    source = case.config.checkpoint.initialize_from
    if source is not None and not Path(source).exists():
        yield case.problem("checkpoint.initialize_from", "no such checkpoint folder")
