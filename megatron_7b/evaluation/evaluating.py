"""A checkpoint, a corpus, a loss: all that `megatron-7b evaluate` does. Torch is loaded once everything is checked."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from megatron_7b.checkpoint import resolve_checkpoint, tokenizer_path
from megatron_7b.checkpoint.inference_config import inference_config
from megatron_7b.config import RunConfig
from megatron_7b.data import resolve_prefix
from megatron_7b.data.samples.corpus_tokenizer import read_corpus_tokenizer
from megatron_7b.data.upkeep.quick_check import check_corpora, refuse_damaged
from megatron_7b.errors import ConfigError
from megatron_7b.evaluation.corpus import check_tokenizer, open_corpus
from megatron_7b.evaluation.result import CorpusLoss, EvaluationProgress
from megatron_7b.tokenizer import load_tokenizer


def evaluate(
    checkpoint: str | Path,
    corpus: str | Path,
    *,
    overrides: Mapping[str, object] | None = None,
    max_samples: int | None = None,
    on_progress: Callable[[EvaluationProgress], None] | None = None,
) -> CorpusLoss:
    """Return the loss of a checkpoint on a corpus; `corpus_loss` says which tokens each window holds.

    Documents are treated as the run treated them, so the loss can be compared with its validation loss.

    Args:
        checkpoint: A step folder, `RUN/checkpoints/latest` or a run folder.
        corpus: The prefix of its `.bin` and `.idx`.
        overrides: Options by dotted path, such as `{"parallel.tensor_model_parallel_size": 2}`. On a CPU the model
            computes in FP32 unless `precision.params_dtype` is among them.
        max_samples: Only the first windows of `data.seq_length` tokens; None reads all.
        on_progress: Called from time to time, on the main rank.

    Returns:
        The same on all ranks.

    Collective: all ranks of the launcher's world; a process without a launcher is a world of its own.

    Raises:
        CheckpointError: There is no complete checkpoint, or it is damaged.
        ConfigError: An option is impossible, or the corpus was written with another tokenizer.
        DataFormatError: The corpus is damaged.
    """
    folder = resolve_checkpoint(Path(checkpoint))
    config = inference_config(folder, overrides)
    check_evaluation(folder, config, str(corpus), max_samples=max_samples)
    (found,) = measure_checkpoint(
        folder,
        config,
        [str(corpus)],
        fp32_on_cpu="precision.params_dtype" not in (overrides or {}),
        max_samples=max_samples,
        on_progress=on_progress,
    )
    return found


def check_evaluation(folder: Path, config: RunConfig, corpus: str, *, max_samples: int | None = None) -> None:
    """Refuse what shows without torch to be impossible. Collective: none.

    Args:
        folder: The step folder.
        config: From `inference_config`.
        corpus: Its prefix.
        max_samples: As for `evaluate`.

    Raises:
        ConfigError: The checkpoint was trained with another tokenizer, or its tokenizer lacks a token.
        DataFormatError: The corpus is damaged.
    """
    if max_samples is not None and max_samples < 1:
        raise ConfigError(f"--max-samples is {max_samples}, expected at least 1")
    _check_same_tokenizer(corpus, folder)
    check_tokenizer(folder, config)
    refuse_damaged(check_corpora([resolve_prefix(corpus)], full=False))


def measure_checkpoint(
    folder: Path,
    config: RunConfig,
    corpora: Sequence[str],
    *,
    fp32_on_cpu: bool = True,
    max_samples: int | None = None,
    on_progress: Callable[[EvaluationProgress], None] | None = None,
) -> list[CorpusLoss]:
    """Open a checkpoint once and return its loss on each corpus; all have passed `check_evaluation`.

    The arguments are those of `evaluate`. Collective: all ranks.
    """
    from megatron_7b.checkpoint.open_model import opened_model
    from megatron_7b.evaluation.corpus_loss import measure_loss

    is_main = os.environ.get("RANK", "0") == "0"
    samples = [open_corpus(corpus, folder, config) for corpus in corpora]
    with opened_model(folder, config, fp32_on_cpu=fp32_on_cpu) as model:
        report = on_progress if is_main else None
        return [measure_loss(model, one, max_samples=max_samples, report=report) for one in samples]


def _check_same_tokenizer(corpus: str, folder: Path) -> None:
    """Refuse a corpus that was written with another tokenizer than the checkpoint carries; either may be unknown."""
    written_with, carried = read_corpus_tokenizer(corpus), tokenizer_path(folder)
    if written_with is None or carried is None:
        return
    (prefix, facts), identity = written_with, load_tokenizer(carried).identity
    if facts.identity != identity:
        raise ConfigError(
            f"{prefix} was written with tokenizer {facts.identity}, but {folder} was trained with {identity}",
            hint=f"preprocess the text with --tokenizer-model {carried}",
        )
