"""The section of a configuration that says what fine-tuning makes of its data."""

from dataclasses import dataclass
from typing import Annotated, Literal

from megatron_7b.config.one_of import OneOf
from megatron_7b.config.preferences import PREFERENCE_LOSSES
from megatron_7b.config.tasks import TASKS

type PoolingMode = Literal["mean", "cls", "last"]


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """What `megatron-7b finetune` makes of its data; `data.train` and `data.valid` name JSONL files there."""

    task: Annotated[str, OneOf(TASKS)] | None = None
    """chat: conversations, of which the assistant's words are trained; sequence_to_sequence: a target text is written
    from a source; preference: which replies people prefer; embedding: vectors of texts; text_classification,
    token_classification and question_answering: a head in the place of the output layer. None outside of
    fine-tuning."""
    train_on: Literal["assistant", "last", "all"] = "assistant"
    """chat: which messages are trained where a record gives no weights: the assistant's, its last one, or all text."""
    chat_template: str | None = None
    """chat: a file with the template; None means the tokenizer's own, or a plain one if it carries none."""
    prompt_template: str | None = None
    """sequence_to_sequence: what the model is given, with keys of the records in braces, such as
    'Summarize: {source}'; None means '{source}', for decoders with a line end after it."""
    target_key: str = "target"
    """sequence_to_sequence: key of the text that the model has to write."""
    max_target_length: int | None = None
    """sequence_to_sequence: most tokens of a target, its end included; None means data.seq_length."""
    labels: tuple[str, ...] = ()
    """text_classification, token_classification: names of the classes or tags, in the order of the outputs; empty:
    those of data.train, sorted."""
    problem_type: Literal["single_label_classification", "multi_label_classification", "regression"] | None = None
    """text_classification: what labels are; None: lists are several, numbers with decimals are regression."""
    tag_scheme: Literal["bio", "plain"] = "bio"
    """token_classification: O, B-NAME and I-NAME, or any tags."""
    doc_stride: int | None = None
    """question_answering: tokens that neighbouring windows of a long text share; None: a quarter of data.seq_length."""
    may_lack_answer: bool = False
    """question_answering: a text need not answer its question; fine-tuning sees that in data.train."""
    packing: bool = True
    """Let several samples share a row, kept apart in attention; otherwise rows are filled up with padding."""
    label_smoothing: float = 0.0
    """chat, sequence_to_sequence: share of each label that is spread over the vocabulary while training.
    preference: share of the pairs whose replies are taken to be the wrong way round (sigmoid, robust)."""
    epochs: float | None = None
    """Passes over the data, which decide training.train_steps; None leaves it as it is set."""
    preference_loss: Annotated[str, OneOf(PREFERENCE_LOSSES)] = "sigmoid"
    """preference: DPO with sigmoid, robust, hinge or ipo; orpo, without a reference; kto, from labelled replies."""
    beta: float = 0.1
    """preference: how strongly the model is held to the one that it starts from (orpo: weight of the odds ratio)."""
    desirable_weight: float = 1.0
    """preference, kto: weight of the losses of replies that are wanted."""
    undesirable_weight: float = 1.0
    """preference, kto: weight of the losses of replies that are not."""
    pooling: Literal["mean", "cls", "last"] = "mean"
    """embedding: what the vector of a text is: the mean of its tokens, its first or its last one."""
    temperature: float = 0.05
    """embedding: what cosines are divided by."""
    matryoshka_dims: tuple[int, ...] = ()
    """embedding: widths at which the beginning of a vector shall be one by itself; nothing: the whole vector only."""
