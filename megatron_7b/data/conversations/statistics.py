"""How long the conversations of a file are, how much of them is trained, and what rows of them would waste."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_7b.data.samples.packing import pack_documents


@dataclass(frozen=True, kw_only=True)
class ConversationStatistics:
    """Of a file, or of the part of it that was looked at.

    Attributes:
        conversations: How many.
        tokens: Of all of them.
        trained_tokens: Those that count as predictions.
        median_length: In tokens, as the others below.
        length_95: 95 of 100 conversations are no longer.
        max_length: The longest one.
        too_long: Conversations of more than `seq_length` tokens.
        padded_share: Share of padding in rows of `seq_length` tokens that hold one conversation each.
        packed_share: The same if conversations share rows.
    """

    conversations: int
    tokens: int
    trained_tokens: int
    median_length: int
    length_95: int
    max_length: int
    too_long: int
    padded_share: float
    packed_share: float


def describe_conversations(
    lengths: NDArray[np.int64], trained: NDArray[np.int64], seq_length: int
) -> ConversationStatistics:
    """Count.

    Args:
        lengths: Tokens of each conversation, [n].
        trained: Trained tokens of each, [n].
        seq_length: Length of a row.
    """
    median, length_95 = np.percentile(lengths, [50, 95], method="higher")
    kept = np.minimum(lengths, seq_length)
    return ConversationStatistics(
        conversations=len(lengths),
        tokens=int(lengths.sum()),
        trained_tokens=int(trained.sum()),
        median_length=int(median),
        length_95=int(length_95),
        max_length=int(lengths.max()),
        too_long=int((lengths > seq_length).sum()),
        padded_share=1 - float(kept.mean()) / seq_length,
        packed_share=1 - pack_documents(kept, seq_length).utilisation,
    )
