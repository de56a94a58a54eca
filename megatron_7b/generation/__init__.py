"""Text from a model: sampling, beam search, a key-value cache, and an engine that streams tokens at any TP×PP.

From Python: `open_session`. Nothing here imports torch before a session is opened.
"""

from megatron_7b.generation.options import GenerationOptions
from megatron_7b.generation.samples import Piece, Sample
from megatron_7b.generation.score import Score, ScoreRequest
from megatron_7b.generation.session import Session, open_session

__all__ = ["GenerationOptions", "Piece", "Sample", "Score", "ScoreRequest", "Session", "open_session"]
