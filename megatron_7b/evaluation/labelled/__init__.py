"""How good labels are: predictions for a file of labelled records against its labels, by the field's measures."""

from megatron_7b.evaluation.labelled.measures import LabelMeasures
from megatron_7b.evaluation.labelled.measuring import evaluate_labels

__all__ = ["LabelMeasures", "evaluate_labels"]
