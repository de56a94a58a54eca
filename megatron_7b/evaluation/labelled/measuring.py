"""Predictions for a file of labelled records against its labels."""

from collections.abc import Callable, Mapping
from itertools import batched
from pathlib import Path
from typing import Any

from megatron_7b.checkpoint import resolve_checkpoint
from megatron_7b.data.labelled import questions, tags, texts
from megatron_7b.data.records.reading import read_records
from megatron_7b.evaluation.labelled.measures import (
    LabelMeasures,
    measure_answers,
    measure_classes,
    measure_numbers,
    measure_several_classes,
    measure_tags,
)
from megatron_7b.prediction.predicting import (
    RECORDS_AT_ONCE,
    PredictionSetup,
    predict_batch,
    read_prediction_setup,
)
from megatron_7b.prediction.tasks import names_of_labels

type Records = list[dict[str, Any]]


def evaluate_labels(
    checkpoint: str | Path, file: str | Path, *, overrides: Mapping[str, object] | None = None
) -> LabelMeasures:
    """Return how good the predictions of a checkpoint with a head are for a file of labelled records.

    Args:
        checkpoint: A step folder, `RUN/checkpoints/latest` or a run folder.
        file: JSONL as `finetune` takes it, or SQuAD's JSON for questions.
        overrides: Options by dotted path, as for `prediction.predict`.

    Returns:
        The same on all ranks: accuracy, macro and micro F1 and Matthews' correlation of classes; Pearson's and
        Spearman's correlation of numbers; seqeval's precision, recall and F1 of names; exact match and F1 of answers.

    Collective: all ranks of the launcher's world; without a launcher this process alone.

    Raises:
        CheckpointError: There is no complete checkpoint, or it is damaged.
        ConfigError: It has no head or no tokenizer, or an option is impossible.
        DataFormatError: Records cannot be used; all mistakes are named with file and line.
    """
    setup = read_prediction_setup(resolve_checkpoint(Path(checkpoint)), overrides)
    records = read_labelled(setup, Path(file))
    fp32_on_cpu = "precision.params_dtype" not in (overrides or {})
    return measure_labels(setup, records, fp32_on_cpu=fp32_on_cpu)


def read_labelled(setup: PredictionSetup, file: Path) -> Records:
    """Return the records of a file, all of them usable.

    Raises:
        DataFormatError: Some are not; all are named.
    """
    config = setup.config
    match config.model.head:
        case "sequence_classification":
            classes = texts.Classes(config.model.problem_type, names_of_labels(config.model))

            def check(record: dict[str, Any]) -> object:
                return classes.values(texts.label_of(record)), setup.task.sequences(record)

            return [record for _, record in read_records(file, _passed(check), name=texts.NAME, example=texts.EXAMPLE)]
        case "token_classification":

            def check(record: dict[str, Any]) -> object:
                return tags.tags_of(record, config.finetune.tag_scheme), setup.task.sequences(record)

            return [record for _, record in read_records(file, _passed(check), name=tags.NAME, example=tags.EXAMPLE)]
        case _:

            def check(record: dict[str, Any]) -> object:
                return questions.answers_of(record), setup.task.sequences(record)

            return [record for _, record in questions.read_questions(file, _passed(check))]


def _passed(check: Callable[[dict[str, Any]], object]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Return what gives a record back if a check has nothing against it."""

    def use(record: dict[str, Any]) -> dict[str, Any]:
        check(record)
        return record

    return use


def measure_labels(setup: PredictionSetup, records: Records, *, fp32_on_cpu: bool = True) -> LabelMeasures:
    """Measure what `read_labelled` has returned. Collective: all ranks."""
    from megatron_7b.checkpoint.open_model import opened_model

    with opened_model(setup.folder, setup.config, fp32_on_cpu=fp32_on_cpu) as model:
        predictions = [
            one for batch in batched(records, RECORDS_AT_ONCE) for one in predict_batch(model, setup.task, batch)
        ]
    return compare(setup, records, predictions)


def compare(setup: PredictionSetup, records: Records, predictions: Records) -> LabelMeasures:
    """Compare predictions with the labels of their records."""
    model, scheme = setup.config.model, setup.config.finetune.tag_scheme
    names = names_of_labels(model)
    match model.head, model.problem_type:
        case "token_classification", _:
            found = [one["tags"] for one in predictions]
            return measure_tags([tags.tags_of(one, scheme) for one in records], found, is_bio=scheme == "bio")
        case "question_answering", _:
            right = [[answer.text for answer in questions.answers_of(one)] for one in records]
            return measure_answers(right, [one["answer"] for one in predictions])
        case _, "regression":
            return measure_numbers([one["label"] for one in records], [one["value"] for one in predictions])
        case _, "multi_label_classification":
            given = [list(map(str, one["label"])) for one in records]
            return measure_several_classes(given, [one["labels"] for one in predictions], names)
        case _:
            return measure_classes([str(one["label"]) for one in records], [one["label"] for one in predictions], names)
