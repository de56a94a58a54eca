"""What fine-tuning may be asked to do, as a configuration names it."""

TASKS: dict[str, str] = {
    "chat": "chat",
    "sequence_to_sequence": "sequence_to_sequence",
    "preference": "preference",
    "text_classification": "text_classification",
    "token_classification": "token_classification",
    "question_answering": "question_answering",
    "embedding": "embedding",
}
"""Tasks by name, each with the objective that trains it. Add to it before a configuration that names the addition is
read; what prepares its data is an entry of `finetune.tasks.PREPARERS`."""
