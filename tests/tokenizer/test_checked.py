"""The fast engines against the reference, and what happens when one is wrong."""

from collections.abc import Callable, Sequence
from unittest import mock

import numpy as np
import orjson
import pytest

from megatron_7b.errors import ConfigError
from megatron_7b.tokenizer import Tokenizer, load_tokenizer
from megatron_7b.tokenizer.checked import CheckedEngine, EngineRejectedError, TrustedEngine, find_disagreement
from megatron_7b.tokenizer.engines import FlatIds, ReferenceEngine, build_fast_engine
from tests.support.assets import asset

ADVERSARIAL = [
    "",
    "\x00",
    "a\x00b\x00\x00",
    " ",
    "\r\n\r\n\t \u00a0\u3000\u2028",
    "<|endoftext|>",
    "x<|endoftext|><|endoftext|> <|im_end|>",
    "".join(map(chr, range(0xD800))),
    "".join(chr(plane << 16 | low) for plane in range(17) for low in (0x0, 0x41, 0xFF00, 0xFFFD, 0xFFFF)),
    "e\u0301\u0301 \u200d\ufe0f \U0001f468\u200d\U0001f469\u200d\U0001f467",
    "ſtraße İstanbul ǅ ﬁ Ⅷ ² ٣ ४",
    "1234567890 3.14159 0x1F 1e-5",
    "don't DON'T 'S 'll I’ve",
    " " * 5000 + "x" + "\n" * 5000,
    "a" * 200_000,
    "".join(chr(97 + index * 7919 % 26) for index in range(200_000)),
]


@pytest.mark.parametrize("name", ["gpt2", "smollm2-135m"])
def test_fastokens_equals_tokenizers(name: str) -> None:
    tokenizer = load_tokenizer(asset(name))
    fast, reason = build_fast_engine(tokenizer, "fastokens", 2)
    assert fast is not None, reason
    corpus = [orjson.loads(line)["text"] for line in asset("sotu.jsonl").read_bytes().splitlines()[::8]]
    texts = [*ADVERSARIAL, *corpus]
    fast_ids, fast_lengths = fast.encode_flat(texts)
    ids, lengths = ReferenceEngine(tokenizer).encode_flat(texts)
    np.testing.assert_array_equal(fast_lengths, lengths)
    np.testing.assert_array_equal(fast_ids, ids)
    assert ids.tolist() == [token for text in texts for token in tokenizer.encode(text)]


class BrokenEngine:
    """The reference with one flaw, planted where `is_wrong` says."""

    name = "broken 1.0"

    def __init__(self, tokenizer: Tokenizer, is_wrong: Callable[[str], bool]) -> None:
        self._reference = ReferenceEngine(tokenizer)
        self._is_wrong = is_wrong

    def encode_flat(self, texts: Sequence[str]) -> FlatIds:
        ids, lengths = self._reference.encode_flat(texts)
        ids = ids.copy()
        for text, end in zip(texts, np.cumsum(lengths), strict=True):
            if self._is_wrong(text):
                ids[end - 1] = 0
        return ids, lengths


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(asset("gpt2"))


def build_broken(tokenizer: Tokenizer, is_wrong: Callable[[str], bool], verify: str = "sample") -> CheckedEngine:
    return CheckedEngine(BrokenEngine(tokenizer, is_wrong), ReferenceEngine(tokenizer), verify=verify)  # type: ignore[arg-type]


def test_probes_reject_an_engine_that_misses_a_special_token(tokenizer: Tokenizer) -> None:
    build_broken(tokenizer, lambda text: False).probe(tokenizer)
    with pytest.raises(EngineRejectedError, match="token 0: reference 50256, fast engine 0"):
        build_broken(tokenizer, lambda text: text == "<|endoftext|>").probe(tokenizer)


def test_the_sample_rejects_an_engine(tokenizer: Tokenizer) -> None:
    engine = build_broken(tokenizer, lambda text: "wrong" in text)
    engine.encode_checked(["right", "wrong"])  # not sampled
    with pytest.raises(EngineRejectedError, match=r"broken 1\.0 differs"):
        engine.encode_checked(["right", "wrong"], sample_characters=4096)


def test_a_new_character_is_compared_and_its_texts_get_the_reference(tokenizer: Tokenizer) -> None:
    engine = build_broken(tokenizer, lambda text: "\u1c89" in text)
    texts = ["plain", "é is fine", "far " * 1000 + "ends in \u1c89", "again \u1c89", "é"]
    checked = engine.encode_checked(texts)
    expected = [tokenizer.encode(text) for text in texts]
    assert checked.ids.tolist() == [token for document in expected for token in document]
    assert checked.lengths.tolist() == [len(document) for document in expected]
    assert [disagreement.text_index for disagreement in checked.disagreements] == [2, 3]
    assert checked.disagreements[0].token_index == len(expected[2]) - 1
    assert "\u1c89" in str(checked.disagreements[0].excerpt)
    assert (checked.compared_texts, checked.compared_characters) == (2, len(texts[2]) + len(texts[3]))
    with mock.patch.object(engine, "_reference", None):  # a proven character is not compared again
        assert engine.encode_checked(["é é é"]).disagreements == []


def test_verify_all_replaces_every_difference(tokenizer: Tokenizer) -> None:
    engine = build_broken(tokenizer, lambda text: text.startswith("w"), verify="all")
    texts = ["a b c", "wrong", "", "w"]
    checked = engine.encode_checked(texts)
    assert checked.ids.tolist() == [token for text in texts for token in tokenizer.encode(text)]
    assert [disagreement.text_index for disagreement in checked.disagreements] == [1, 3]
    assert (checked.compared_texts, checked.compared_characters) == (4, sum(map(len, texts)))
    plain = TrustedEngine(ReferenceEngine(tokenizer)).encode_checked(texts, sample_characters=10)
    assert plain.ids.tolist() == checked.ids.tolist()
    assert plain.disagreements == []


def test_find_disagreement_when_one_encoding_is_longer() -> None:
    short, long = np.array([1, 2], np.uint32), np.array([1, 2, 3], np.uint32)
    assert find_disagreement(0, "abc", short, short) is None
    difference = find_disagreement(0, "abc", short, long)
    assert difference is not None
    assert (difference.token_index, difference.fast_token, difference.reference_token) == (2, None, 3)


def test_which_engine_serves(tokenizer: Tokenizer) -> None:
    assert build_fast_engine(load_tokenizer("bytes"), "auto", 1)[0] is None
    assert build_fast_engine(tokenizer, "tokenizers", 1)[0] is None
    with pytest.raises(ConfigError, match="does not read bytes tokenizers"):
        build_fast_engine(load_tokenizer("bytes"), "fastokens", 1)
    with pytest.raises(ConfigError, match="unknown"):
        build_fast_engine(tokenizer, "slowtokens", 1)
