"""Streams of text: pieces add up to what decoding all tokens gives, whatever the tokens, and are whole characters."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from megatron_7b.generation.text_stream import TextStream, byte_ids, text_stream
from megatron_7b.tokenizer import Tokenizer, load_tokenizer
from tests.conversion.tiny_models import save_foreign_tokenizer, save_tiny_tokenizer
from tests.support.assets import asset

BYTES = load_tokenizer("bytes")
KINDS = [
    *("bytes", "tiktoken", "bpe", "unigram", "byte-level", "byte-fallback", "llama"),
    *("wordpiece", "metaspace", "suffixes", "no decoder", "byte-level in part"),
]
CORPUS = ["the cat sat on the mat, the cat's 12 o'clock 123 nap, naïve café ▁ 漢字 def f(x): do not"] * 20
NUM_SEQUENCES = 400


def pieces(stream: TextStream, ids: Sequence[int]) -> list[str]:
    return [*(stream.add(token) for token in ids), stream.finish()]


def save_tokenizer(kind: str, folder: Path) -> None:
    """Make a small tokenizer whose decoder is of the kind."""
    if kind in ("bytes", "tiktoken", "bpe", "unigram"):
        save_foreign_tokenizer(kind, folder)
    elif kind == "byte-level":
        save_tiny_tokenizer(folder)
    elif kind == "byte-fallback":
        from megatron_7b.tokenizer.train import BpeOptions, save_hugging_face_folder, train_bpe

        options = BpeOptions(vocab_size=330, byte_fallback=True)
        save_hugging_face_folder(train_bpe(iter([CORPUS]), options), options, folder)
    else:
        folder.mkdir()
        (folder / "tokenizer.json").write_text(json.dumps(definition(kind)))


def definition(kind: str) -> dict[str, object]:
    """A tokenizer.json: one token per character and per byte, a few words, and the decoder of the kind."""
    words = ["the", "cat", "##s", "##at", "do", "not", "n't", "'", "'m", "'s", ",", ".", "▁the", "▁cat", "▁", "▁▁", "�"]
    words += [
        "at</w>",
        "e</w>",
        "Ġthe",
        "Ċ",
        "Ã",
        "©",
        "é",
        "漢",
        " ",
        "  ",
        "",
        *(f"<0x{byte:02X}>" for byte in range(256)),
    ]
    decoder = {
        "llama": decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        ),
        "wordpiece": decoders.WordPiece(cleanup=True),
        "metaspace": decoders.Metaspace(),
        "suffixes": decoders.BPEDecoder(),
        "no decoder": None,
        "byte-level in part": decoders.Sequence([decoders.ByteLevel(), decoders.Replace("cat", "dog")]),
    }[kind]
    backend = Backend(models.WordLevel({word: token for token, word in enumerate(dict.fromkeys(words))}, ","))
    backend.pre_tokenizer = pre_tokenizers.Punctuation()
    if decoder is not None:
        backend.decoder = decoder
    backend.add_special_tokens(["<s>", "</s>", "<|ü|>"])
    return json.loads(backend.to_str())


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer") / "it"
    save_tokenizer(request.param, folder)
    return load_tokenizer(folder)


@given(st.data())
@settings(max_examples=NUM_SEQUENCES)
def test_pieces_add_up_to_the_text_of_all_tokens(tokenizer: Tokenizer, data: st.DataObject) -> None:
    ids = data.draw(sequences(tokenizer))
    assert "".join(pieces(text_stream(tokenizer), ids)) == tokenizer.decode(ids)


@given(st.data())
@settings(max_examples=NUM_SEQUENCES)
def test_pieces_continue_the_text_of_a_prompt(tokenizer: Tokenizer, data: st.DataObject) -> None:
    """The prompt may end within a run of bytes: what such a run means is not known before it ends."""
    prompt, ids = data.draw(sequences(tokenizer)), data.draw(sequences(tokenizer))
    while prompt and (prompt[-1] in byte_ids(tokenizer) or tokenizer.decode(prompt).endswith("\ufffd")):
        prompt.pop()
    before, whole = tokenizer.decode(prompt), tokenizer.decode([*prompt, *ids])
    if whole.startswith(before):  # clean-up may reach back into a prompt that ends in an apostrophe
        assert "".join(pieces(text_stream(tokenizer, prompt), ids)) == whole[len(before) :]


def sequences(tokenizer: Tokenizer) -> st.SearchStrategy[list[int]]:
    """Ids of any kind, with runs of bytes and of special tokens in them."""
    anything = st.integers(0, tokenizer.vocab_size - 1)
    of_interest = sorted(tokenizer.special_ids | byte_ids(tokenizer))
    if not of_interest:
        return st.lists(anything, max_size=60)
    return st.lists(st.one_of(anything, st.sampled_from(of_interest)), max_size=60)


@given(st.binary(max_size=40))
@example(bytes.fromhex("ffffffffe282ac41"))
@example(bytes.fromhex("f09f91f09f918d"))
@settings(max_examples=2000)
def test_bytes_that_are_no_text_are_what_python_makes_of_them(content: bytes) -> None:
    assert "".join(pieces(text_stream(BYTES), list(content))) == content.decode(errors="replace")


@given(st.text(), st.text())
def test_pieces_of_a_text_are_whole_characters(before: str, text: str) -> None:
    parts = pieces(text_stream(BYTES, BYTES.encode(before)), BYTES.encode(text))
    assert "".join(parts) == text
    assert all(piece in text for piece in parts)


def test_a_character_comes_with_its_last_byte() -> None:
    stream = text_stream(BYTES)
    assert [stream.add(token) for token in BYTES.encode("é👍!")] == ["", "é", "", "", "", "👍", "!"]
    assert stream.finish() == ""


def test_a_text_that_ends_within_a_character_shows_so_at_the_end() -> None:
    stream = text_stream(BYTES)
    assert [stream.add(token) for token in BYTES.encode("👍")[:3]] == ["", "", ""]
    assert stream.finish() == "\ufffd"


def test_tokens_that_come_at_once_are_not_held_back(tokenizer: Tokenizer) -> None:
    """A text of whole tokens comes token by token, not at the end."""
    stream = text_stream(tokenizer, tokenizer.encode("the"))
    shown = [stream.add(token) for token in tokenizer.encode("the,the,the,the,")]
    assert "".join(shown).count("the") >= 3


@pytest.mark.parametrize("token", ["special", "byte", "space"])
def test_long_runs_take_time_in_proportion(tokenizer: Tokenizer, token: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens decoded over the whole stream, counted: a bound for each token, not for each pair of tokens."""
    candidates = {"special": sorted(tokenizer.special_ids), "byte": sorted(byte_ids(tokenizer)), "space": []}[token]
    run = (candidates or tokenizer.encode(" ") or [0])[-1:] * 2000
    decoded = 0
    decode = type(tokenizer).decode

    def counted(self: Tokenizer, ids: Sequence[int]) -> str:
        nonlocal decoded
        decoded += len(ids)
        return decode(self, ids)

    monkeypatch.setattr(type(tokenizer), "decode", counted)
    start = tokenizer.encode("the")
    parts = pieces(text_stream(tokenizer), [*start, *run, *start])
    assert decoded < 40 * len(run)
    monkeypatch.undo()
    assert "".join(parts) == tokenizer.decode([*start, *run, *start])


@pytest.mark.parametrize("num_special", [1, 40])
def test_a_space_before_special_tokens_begins_a_text(tokenizer: Tokenizer, num_special: int) -> None:
    """What may lose its space at the beginning of a text keeps it after any number of tokens without a text."""
    spaces = [token for token in range(tokenizer.vocab_size) if tokenizer.spell(token) in ("▁", " ", "Ġ")]
    special = sorted(tokenizer.special_ids)
    for start in ([], spaces[:1], special[-1:], [*special[-1:], *spaces[:1]]):
        ids = [*start, *special[-1:] * num_special, *tokenizer.encode("the"), *spaces, *tokenizer.encode("the,")]
        assert "".join(pieces(text_stream(tokenizer), ids)) == tokenizer.decode(ids)


def test_ids_beyond_the_vocabulary_give_nothing(tokenizer: Tokenizer) -> None:
    """A model may have more embeddings than its tokenizer has tokens."""
    ids = tokenizer.encode("the,")
    beyond = tokenizer.vocab_size + 3
    assert "".join(pieces(text_stream(tokenizer, [beyond]), [*ids, beyond, *ids])) == tokenizer.decode([*ids, *ids])


@pytest.mark.parametrize("name", ["smollm2-135m", "gpt2"])
def test_a_real_tokenizer_streams_the_continuation_of_a_prompt(name: str) -> None:
    tokenizer = load_tokenizer(asset(name))
    prompt, text = tokenizer.encode("The state of"), " the Union — 你好, 👩‍👩‍👧‍👦 naïve\n\n  ok"
    parts = pieces(text_stream(tokenizer, prompt), tokenizer.encode(text))
    assert "".join(parts) == text
    assert len([piece for piece in parts if piece]) > 8


@given(st.lists(st.integers(0, 49_151), max_size=80))
@settings(max_examples=1000)
def test_any_tokens_of_a_real_tokenizer(ids: list[int]) -> None:
    tokenizer = load_real_tokenizer()
    assert "".join(pieces(text_stream(tokenizer), ids)) == tokenizer.decode(ids)


def load_real_tokenizer(loaded: list[Tokenizer] = []) -> Tokenizer:  # noqa: B006  # loaded once for all examples
    if not loaded:
        loaded.append(load_tokenizer(asset("smollm2-135m")))
    return loaded[0]
