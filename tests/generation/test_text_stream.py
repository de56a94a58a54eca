"""Streams of text: the pieces add up to the whole, and no piece holds half a character."""

from hypothesis import given
from hypothesis import strategies as st

from megatron_7b.generation.text_stream import TextStream
from megatron_7b.tokenizer import load_tokenizer
from tests.support.assets import asset

BYTES = load_tokenizer("bytes")


def pieces(stream: TextStream, ids: list[int]) -> list[str]:
    return [*(stream.add(token) for token in ids), stream.finish()]


@given(st.text(), st.text())
def test_pieces_of_bytes_add_up_and_are_whole_characters(before: str, text: str) -> None:
    parts = pieces(TextStream(BYTES, BYTES.encode(before)), BYTES.encode(text))
    assert "".join(parts) == text
    assert all(piece in text for piece in parts)


@given(st.binary(max_size=40))
def test_bytes_that_are_no_text_add_up_too(content: bytes) -> None:
    offset = BYTES.encode("\0")[0]
    ids = [offset + byte for byte in content]
    assert "".join(pieces(TextStream(BYTES), ids)) == BYTES.decode(ids)


def test_a_character_comes_with_its_last_byte() -> None:
    stream = TextStream(BYTES)
    assert [stream.add(token) for token in BYTES.encode("é👍!")] == ["", "é", "", "", "", "👍", "!"]
    assert stream.finish() == ""


def test_a_text_that_ends_within_a_character_shows_so_at_the_end() -> None:
    stream = TextStream(BYTES)
    assert [stream.add(token) for token in BYTES.encode("👍")[:3]] == ["", "", ""]
    assert stream.finish() == "\ufffd"


def test_a_real_tokenizer_streams_the_continuation_of_a_prompt() -> None:
    tokenizer = load_tokenizer(asset("smollm2-135m"))
    prompt, text = tokenizer.encode("The state of"), " the Union — 你好, 👩‍👩‍👧‍👦 naïve\n\n  ok"
    parts = pieces(TextStream(tokenizer, prompt), tokenizer.encode(text))
    assert "".join(parts) == text
    assert len([piece for piece in parts if piece]) > 8
