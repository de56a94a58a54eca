"""Predictions for records: in Python, or from file to file."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import batched
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_7b.checkpoint import resolve_checkpoint, tokenizer_path
from megatron_7b.checkpoint.inference_config import inference_config
from megatron_7b.config import RunConfig
from megatron_7b.data.records.reading import RecordError
from megatron_7b.errors import ConfigError, DataFormatError
from megatron_7b.prediction.tasks import PredictedTask, Record, build_task
from megatron_7b.tokenizer import Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from megatron_7b.model.on_ranks import ModelOnRanks

RECORDS_AT_ONCE = 64
"""Records whose sequences share rows; results are known after each of such batches."""


@dataclass(frozen=True)
class PredictionSetup:
    """A checkpoint with a head, read and checked; needs no torch.

    Attributes:
        folder: The complete checkpoint.
        config: Its configuration, from `inference_config`.
        task: What its head is for.
    """

    folder: Path
    config: RunConfig
    task: PredictedTask


def predict(
    checkpoint: str | Path, records: Iterable[Record], *, overrides: Mapping[str, object] | None = None
) -> list[dict[str, Any]]:
    """Return what a checkpoint with a head predicts for each record.

    Args:
        checkpoint: A step folder, `RUN/checkpoints/latest` or a run folder.
        records: `{"text"[, "text_pair"]}` for classes of texts, `{"tokens"}` for tags, `{"question", "context"}` for
            answers; other keys are ignored.
        overrides: Options by dotted path, such as `{"parallel.tensor_model_parallel_size": 2}`. On a CPU the model
            computes in FP32 unless `precision.params_dtype` is among them.

    Returns:
        A prediction per record, as `PredictedTask.prediction` describes it for its head: the label with its score and
        those of all, a tag per word and the names that they mark, or the answer with its place in the text.

    Collective: all ranks of the launcher's world, with the same records; without a launcher this process alone.

    Raises:
        CheckpointError: There is no complete checkpoint, or it is damaged.
        ConfigError: It has no head or no tokenizer, or an option is impossible.
        DataFormatError: A record cannot be used; its number is named.
    """
    setup = read_prediction_setup(resolve_checkpoint(Path(checkpoint)), overrides)
    given = list(records)
    for number, record in enumerate(given):
        try:
            setup.task.sequences(record)
        except RecordError as error:
            raise DataFormatError(f"record {number}: {error}") from None
    fp32_on_cpu = "precision.params_dtype" not in (overrides or {})
    from megatron_7b.checkpoint.open_model import opened_model

    with opened_model(setup.folder, setup.config, fp32_on_cpu=fp32_on_cpu) as model:
        return [one for batch in batched(given, RECORDS_AT_ONCE) for one in predict_batch(model, setup.task, batch)]


def read_prediction_setup(folder: Path, overrides: Mapping[str, object] | None = None) -> PredictionSetup:
    """Read a checkpoint's configuration and tokenizer.

    Raises:
        ConfigError: It has no head or no tokenizer, or an option is impossible.
    """
    return prediction_setup(folder, inference_config(folder, overrides))


def prediction_setup(folder: Path, config: RunConfig) -> PredictionSetup:
    """Return the setup of a checkpoint whose configuration has been read.

    Raises:
        ConfigError: It has no head or no tokenizer.
    """
    return PredictionSetup(folder, config, build_task(config, _tokenizer(folder)))


def predict_batch(model: "ModelOnRanks", task: PredictedTask, records: Iterable[Record]) -> Iterator[dict[str, Any]]:
    """Return the predictions for some records, all of them usable.

    Collective: all ranks, with the same records.
    """
    from megatron_7b.prediction.running import compute_outputs

    given = list(records)
    sequences = [task.sequences(record) for record in given]
    outputs = iter(compute_outputs(model, [one for of_record in sequences for one in of_record]))
    return (
        task.prediction(record, [next(outputs) for _ in of_record])
        for record, of_record in zip(given, sequences, strict=True)
    )


def _tokenizer(folder: Path) -> Tokenizer:
    carried = tokenizer_path(folder)
    if carried is None:
        raise ConfigError(f"{folder} carries no tokenizer, which its texts are encoded with")
    return load_tokenizer(carried)
