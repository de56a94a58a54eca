"""Every step takes every text: what is on the web is stranger than any example."""

from functools import cache

from hypothesis import given
from hypothesis import strategies as st

from megatron_7b.prepare.document import Document, DocumentStep, Removed
from megatron_7b.prepare.document_sections import PiiSection
from megatron_7b.prepare.recipe import load_recipe
from megatron_7b.prepare.rules.pii import PiiMasking
from megatron_7b.prepare.running.steps import build_steps

_PIECES = st.one_of(
    st.text(st.characters(exclude_categories=("Cs",)), max_size=30),
    st.sampled_from(["a@b.co", "8.8.8.8", "+49 30 123456", "DE89 3704 0044 0532 0130 00", "\n", "\n\n", "…", "很好。"]),
    st.sampled_from(["<p>", "<script>", "</div>", "<!--", "<table><tr><td>", "&amp;", "\0", "\u2028", "٣٤٥", "²³¹"]),
)
TEXTS = st.lists(_PIECES, max_size=30).map("".join)


@cache
def steps() -> dict[str, DocumentStep]:
    turned_on = {"quality.c4": "{}", "quality.fineweb": "{}", "quality.gopher_quality.min_words": 0}
    return build_steps(load_recipe([], turned_on).recipe)


@given(TEXTS)
def test_every_step_decides(text: str) -> None:
    for name, step in steps().items():
        outcome = step(Document(text, "file", 1, is_html=name == "extraction"))
        if isinstance(outcome, Removed):
            assert outcome.reason.partition(":")[0] == name
        else:
            outcome.text.encode()


@given(TEXTS)
def test_masking_twice_is_masking_once(text: str) -> None:
    masking = PiiMasking(PiiSection())
    once = masking.mask(text)
    assert masking.mask(once) == once
