"""T5's relative position bias: the buckets of every distance are those of transformers, whatever their number."""

import pytest
import torch
from transformers.models.t5.modeling_t5 import T5Attention

from megatron_7b.model.kinds.encoder_decoder.relative_bias import find_buckets


@pytest.mark.parametrize("is_bidirectional", [True, False])
@pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 128), (4, 3), (9, 11), (64, 2048), (33, 17)])
def test_buckets(num_buckets: int, max_distance: int, is_bidirectional: bool) -> None:
    distances = torch.arange(-3000, 3001)
    expected = T5Attention._relative_position_bucket(distances, is_bidirectional, num_buckets, max_distance)
    found = find_buckets(distances, num_buckets, max_distance=max_distance, is_bidirectional=is_bidirectional)
    assert torch.equal(found, expected)
