"""The split is a function of the text: shares hold, and nothing moves when shares or data grow."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from megatron_7b.prepare.corpus_sections import SplitSection
from megatron_7b.prepare.rules.split import choose_split


def test_shares_hold() -> None:
    section = SplitSection(validation=0.1, test=0.05)
    counts = Counter(choose_split(f"document {number}", section) for number in range(20_000))
    assert abs(counts["validation"] - 2000) < 200
    assert abs(counts["test"] - 1000) < 150


def test_no_share_takes_nothing_and_a_whole_one_all() -> None:
    texts = [f"document {number}" for number in range(1000)]
    for section, expected in (
        (SplitSection(validation=0, test=0), "train"),
        (SplitSection(validation=1, test=0), "validation"),
        (SplitSection(validation=0, test=1), "test"),
    ):
        assert {choose_split(text, section) for text in texts} == {expected}


@given(
    st.text(),
    st.floats(0, 0.5),
    st.floats(0, 0.5),
    st.floats(0, 0.5),
    st.floats(0, 0.5),
)
def test_growing_shares_take_from_train_only(text: str, a: float, b: float, c: float, d: float) -> None:
    small = choose_split(text, SplitSection(validation=min(a, b), test=min(c, d)))
    large = choose_split(text, SplitSection(validation=max(a, b), test=max(c, d)))
    assert small in ("train", large)


def test_the_place_of_a_text_never_changes() -> None:
    """Written down: another version would move documents of corpora that exist."""
    section = SplitSection(validation=0.3, test=0.3)
    assert (
        "".join(choose_split(text, section)[1] for text in "abcdefghijkl") == "rraearrraaar"
    )  # tRain, vAlidation, tEst
