"""What a model is trained for: which samples it gets, which inputs it takes of them, which sums are made of its output.

Training, validation and evaluation share an objective, so that their losses are the same quantity. To add one, put it
into `BUILDERS`, and its name into `config.objectives.OBJECTIVES`. Importing the package imports no torch.
"""

from collections.abc import Callable

from megatron_7b.config.schema import RunConfig
from megatron_7b.objective.objective import Objective

__all__ = ["BUILDERS", "Objective", "build_objective"]


def _causal(config: RunConfig) -> Objective:
    from megatron_7b.objective.causal import CausalLanguageModeling

    return CausalLanguageModeling(config)


def _chat(config: RunConfig) -> Objective:
    from megatron_7b.objective.chat import ConversationTraining

    return ConversationTraining(config)


def _preference(config: RunConfig) -> Objective:
    from megatron_7b.objective.preference import PreferenceTraining

    return PreferenceTraining(config)


def _embedding(config: RunConfig) -> Objective:
    from megatron_7b.objective.contrastive import EmbeddingTraining

    return EmbeddingTraining(config)


def _masked(config: RunConfig) -> Objective:
    from megatron_7b.objective.masked import MaskedLanguageModeling

    return MaskedLanguageModeling(config)


def _sequence_to_sequence(config: RunConfig) -> Objective:
    from megatron_7b.objective.sequence_to_sequence import SourceContinuation, SourceToTarget

    of_kind = SourceToTarget if config.model.traits.kind == "encoder_decoder" else SourceContinuation
    return of_kind(config)


def _span(config: RunConfig) -> Objective:
    from megatron_7b.objective.span import SpanCorruption

    return SpanCorruption(config)


def _text_classification(config: RunConfig) -> Objective:
    from megatron_7b.objective.heads.text_classification import TextClassification

    return TextClassification(config)


def _token_classification(config: RunConfig) -> Objective:
    from megatron_7b.objective.heads.token_classification import TokenClassification

    return TokenClassification(config)


def _question_answering(config: RunConfig) -> Objective:
    from megatron_7b.objective.heads.question_answering import QuestionAnswering

    return QuestionAnswering(config)


BUILDERS: dict[str, Callable[[RunConfig], Objective]] = {
    "causal": _causal,
    "chat": _chat,
    "preference": _preference,
    "embedding": _embedding,
    "masked": _masked,
    "sequence_to_sequence": _sequence_to_sequence,
    "span": _span,
    "text_classification": _text_classification,
    "token_classification": _token_classification,
    "question_answering": _question_answering,
}


def build_objective(config: RunConfig) -> Objective:
    """Return the objective of a run."""
    return BUILDERS[config.objective_name](config)
