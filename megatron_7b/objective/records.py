"""What objectives on records share: how a configuration lays them out."""

from megatron_7b.config.schema import RunConfig
from megatron_7b.data.records.rows import RecordLayout
from megatron_7b.tokenizer import Tokenizer


def layout_of(config: RunConfig, tokenizer: Tokenizer | None, *, name: str) -> RecordLayout:
    """Return how the records of a run are laid out.

    Args:
        config: The run.
        tokenizer: Of the corpora, for what fills up rows; any token will do, as nothing attends to it.
        name: The kind of records, in the plural, as their corpora are marked.
    """
    known = (tokenizer.pad_id, tokenizer.eod_id) if tokenizer is not None else ()
    return RecordLayout(
        seq_length=config.data.seq_length,
        seed=config.training.seed,
        packed=config.finetune.packing,
        pad_id=next((token for token in known if token is not None), 0),
        name=name,
    )
