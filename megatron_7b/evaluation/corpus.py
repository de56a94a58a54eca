"""The corpus of an evaluation, read as the model was trained to read."""

from pathlib import Path

from megatron_7b.checkpoint import tokenizer_path
from megatron_7b.config import RunConfig
from megatron_7b.data import Dataset, open_sequential
from megatron_7b.errors import ConfigError
from megatron_7b.tokenizer import load_tokenizer


def open_corpus(prefix: str, checkpoint: Path, config: RunConfig) -> Dataset:
    """Open a corpus in the order of the file, with the options for documents of the checkpoint's run.

    As in that run's training and validation, documents are kept apart in attention (`data.reset_attention_mask`,
    `data.reset_position_ids`) and predictions after their ends left out of the loss (`data.eod_mask_loss`).

    Args:
        prefix: The corpus.
        checkpoint: The step folder, whose tokenizer says which token ends a document.
        config: From `inference_config`.

    Raises:
        ConfigError: Such predictions are to be left out, and the end-of-document token is not known.
        DataFormatError: A file is damaged, or holds fewer than two tokens.

    **Collective:** none.
    """
    data = config.data
    return open_sequential(
        prefix,
        seq_length=data.seq_length,
        vocab_size=config.model.vocab_size,
        masked_eod=_eod_id(checkpoint) if data.eod_mask_loss else None,
        document_boundaries=data.reset_attention_mask,
        reset_position_ids=data.reset_position_ids,
    )


def _eod_id(checkpoint: Path) -> int:
    carried = tokenizer_path(checkpoint)
    eod_id = load_tokenizer(carried).eod_id if carried is not None else None
    if eod_id is None:
        raise ConfigError(
            f"data.eod_mask_loss is set, but {checkpoint} carries no tokenizer with an end-of-document token",
            hint="--data.eod-mask-loss False counts every prediction",
        )
    return eod_id
