"""The tasks of fine-tuning: each a file that turns what users write into what a run reads.

To add one: a file here with a function like those below, an entry in `PREPARERS` and in `config.tasks.TASKS`, and the
objective that trains it.
"""

from collections.abc import Callable

from megatron_7b.finetune.preparation import Preparation, PreparedData
from megatron_7b.finetune.tasks.chat import prepare_chat
from megatron_7b.finetune.tasks.classic import (
    prepare_question_answering,
    prepare_text_classification,
    prepare_token_classification,
)
from megatron_7b.finetune.tasks.embedding import prepare_embedding
from megatron_7b.finetune.tasks.preference import prepare_preference
from megatron_7b.finetune.tasks.sequence_to_sequence import prepare_sequence_to_sequence

PREPARERS: dict[str, Callable[[Preparation], PreparedData]] = {
    "chat": prepare_chat,
    "sequence_to_sequence": prepare_sequence_to_sequence,
    "preference": prepare_preference,
    "text_classification": prepare_text_classification,
    "token_classification": prepare_token_classification,
    "question_answering": prepare_question_answering,
    "embedding": prepare_embedding,
}
