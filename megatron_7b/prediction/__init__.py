"""Labels for new data: a checkpoint with a head classifies texts and words, and answers questions.

Importing the package loads no torch; `running` does.
"""

from megatron_7b.prediction.predicting import predict

__all__ = ["predict"]
