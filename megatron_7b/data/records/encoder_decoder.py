"""Records of two parts as an encoder-decoder takes them: the first for the encoder, the second for the decoder."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from megatron_7b.data.records.rows import RecordDataset
from megatron_7b.data.samples.dataset import Batch


class EncoderDecoderDataset(RecordDataset):
    """Samples are one record each; the arrays of a batch are as long as its longest source, and its longest target.

    The second part of a record begins with what the decoder begins with; from there on every token is predicted from
    those before it.
    """

    def batch(self, indices: Sequence[int] | NDArray[np.int64]) -> Batch:
        """Return the samples of these global numbers, in this order."""
        rows = super().batch(indices)
        assert rows.records is not None
        assert len(rows.records.begins) == 2 * len(indices), "a record per row, of two parts"
        begins, lengths = (of_parts.reshape(-1, 2).T for of_parts in (rows.records.begins, rows.records.lengths))
        source, is_source = _places(begins[0], lengths[0])
        target, is_target = _places(begins[1], lengths[1] - 1)  # the last token has no successor
        tokens = rows.tokens.ravel()
        return Batch(
            np.where(is_source, tokens[source], 0),
            np.where(is_target, rows.labels.ravel()[target], 0),
            np.where(is_target, rows.loss_mask.ravel()[target], np.float32(0)),
            position_ids=np.tile(np.arange(source.shape[1], dtype=np.int64), (len(source), 1)),
            decoder_tokens=np.where(is_target, tokens[target], 0),
            attention_mask=None if is_source.all() else is_source,
        )


def _places(begins: NDArray[np.int64], lengths: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Return where the tokens of pieces are, as rows [b, longest], and which of these places are within the pieces."""
    offsets = np.arange(int(lengths.max()))
    is_within = offsets < lengths[:, None]
    return np.where(is_within, begins[:, None] + offsets, 0), is_within
