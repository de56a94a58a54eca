"""Evaluation: the loss of a model on a corpus, and what tokenizers spend on the words of a text.

Importing the package loads no torch; `corpus_loss` does.
"""

from megatron_7b.evaluation.evaluating import evaluate
from megatron_7b.evaluation.fertility import Fertility, FertilityReport, measure_fertility
from megatron_7b.evaluation.result import CorpusLoss, EvaluationProgress
from megatron_7b.evaluation.retrieval import Retrieval, evaluate_retrieval

__all__ = [
    "CorpusLoss",
    "EvaluationProgress",
    "Fertility",
    "FertilityReport",
    "Retrieval",
    "evaluate",
    "evaluate_retrieval",
    "measure_fertility",
]
