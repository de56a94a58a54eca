"""The corpus of an evaluation, read as the model was trained to read."""

from pathlib import Path

from megatron_7b.checkpoint import tokenizer_path
from megatron_7b.config import RunConfig
from megatron_7b.objective import build_objective
from megatron_7b.objective.objective import Samples
from megatron_7b.tokenizer import Tokenizer, load_tokenizer


def open_corpus(prefix: str, checkpoint: Path, config: RunConfig) -> Samples:
    """Open a corpus in the order of the file, with the objective of the checkpoint's run.

    As in that run's training and validation, documents are kept apart in attention (`data.reset_attention_mask`,
    `data.reset_position_ids`) and predictions after their ends left out of the loss (`data.eod_mask_loss`).

    Args:
        prefix: The corpus.
        checkpoint: The step folder, whose tokenizer has the special tokens that the objective needs.
        config: From `inference_config`.

    Raises:
        ConfigError: A token that the objective needs is not known.
        DataFormatError: A file is damaged, or holds fewer than two tokens.

    Collective: none.
    """
    return build_objective(config).open_corpus(prefix, config, _tokenizer(checkpoint))


def check_tokenizer(checkpoint: Path, config: RunConfig) -> None:
    """Refuse a checkpoint whose tokenizer lacks a token that the objective needs.

    Args:
        checkpoint: The step folder.
        config: From `inference_config`.

    Raises:
        ConfigError: It lacks one, or there is no tokenizer.
    """
    objective = build_objective(config)
    if objective.needs_tokenizer:
        objective.check_tokenizer(config, _tokenizer(checkpoint))


def _tokenizer(checkpoint: Path) -> Tokenizer | None:
    carried = tokenizer_path(checkpoint)
    return load_tokenizer(carried) if carried is not None else None
