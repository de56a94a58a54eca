"""Shares of documents for training, validation and test."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_7b.data import document_range, parse_split
from megatron_7b.data.samples.split import SPLITS
from megatron_7b.errors import ConfigError


def test_parsing() -> None:
    assert parse_split("98,2,0") == (0.98, 0.02, 0.0)
    assert parse_split("1") == (1.0, 0.0, 0.0)
    assert parse_split("0.5, 0.5") == (0.5, 0.5, 0.0)


@pytest.mark.parametrize("split", ["", "a,b", "1,2,3,4", "-1,2", "0,0,0", "nan,1", "inf,1"])
def test_malformed_shares_are_refused(split: str) -> None:
    with pytest.raises(ConfigError, match=r"data\.split"):
        parse_split(split)


@given(
    shares=st.tuples(*[st.floats(0, 1000)] * 3).filter(lambda shares: sum(shares) > 1e-3),
    num_documents=st.integers(0, 2**40),
)
def test_ranges_cover_all_documents_in_order(shares: tuple[float, float, float], num_documents: int) -> None:
    normalised = parse_split(",".join(map(str, shares)))
    ranges = [document_range(num_documents, normalised, split) for split in SPLITS]
    assert ranges[0][0] == 0
    assert ranges[-1][1] == num_documents
    assert all(before[1] == after[0] for before, after in pairwise(ranges))
    for (first, end), share in zip(ranges, normalised, strict=True):
        assert abs(end - first - share * num_documents) <= 1 + 1e-9 * num_documents
        assert share > 0 or end == first


def test_bounds_are_rounded_to_the_nearest_document() -> None:
    """As Megatron does: of ten documents, 2 % is none."""
    shares = parse_split("98,2,0")
    assert [document_range(10, shares, split) for split in SPLITS] == [(0, 10), (10, 10), (10, 10)]
    assert [document_range(30, shares, split) for split in SPLITS] == [(0, 29), (29, 30), (30, 30)]
