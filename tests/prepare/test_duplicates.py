"""Exact and near duplicates: what goes, what stays, and that neither shards nor passes change it."""

import itertools
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_7b.prepare.corpus_sections import DuplicatesSection
from megatron_7b.prepare.document import DuplicateFinder
from megatron_7b.prepare.duplicates.exact import ExactDuplicates
from megatron_7b.prepare.duplicates.near import NearDuplicates, choose_rows_per_band
from megatron_7b.prepare.shingles import hash_shingles, hash_words

SECTION = DuplicatesSection()


def keepers(
    finder: DuplicateFinder, texts: Sequence[str], folder: Path, shards: int = 1, present: Sequence[bool] | None = None
) -> list[int]:
    """Which document stays in place of each, with the texts cut into so many shards."""
    folder.mkdir(exist_ok=True)
    cuts = np.linspace(0, len(texts), shards + 1).astype(int)
    paths = []
    for number, (start, end) in enumerate(itertools.pairwise(cuts)):
        paths.append(folder / f"{number}.npy")
        np.save(paths[-1], finder.sign(texts[start:end]))
    is_present = np.ones(len(texts), dtype=np.bool_) if present is None else np.array(present)
    return finder.find_keepers(paths, is_present, folder).tolist()


def edit(text: str, share: float, rng: random.Random) -> str:
    """The text with a share of its words replaced."""
    return " ".join(f"w{rng.random()}" if rng.random() < share else word for word in text.split())


def random_texts(count: int, words: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(f"word{rng.randrange(5000)}" for _ in range(words)) for _ in range(count)]


# ------------------------------------------------------------------------------------------------------------- words


def python_words(text: str) -> list[str]:
    """The reference: words one character after the other."""
    words, current = [], ""
    for character in text.lower():
        code = ord(character)
        if character in "\u3000、。〈〉《》「」" or 0x80 <= code < 0xC0 or 0x2000 <= code < 0x2080:
            kind = "separator"
        elif code < 0x80:
            kind = "word" if character.isalnum() else "separator"
        else:
            alone = ((0x3000, 0xE000), (0x10000, 0x40000), (0xE00, 0xF00), (0x1000, 0x1080), (0x1780, 0x1800))
            kind = "alone" if any(first <= code < end for first, end in alone) else "word"
        if kind == "word":
            current += character
            continue
        words += [current] if current else []
        current = ""
        words += [character] if kind == "alone" else []
    return words + ([current] if current else [])


@given(st.lists(st.text(st.sampled_from("aB9 ,.\n\0é«’中文字。が🙂жขမក្\u3000\ud800")), max_size=5))
def test_words_are_those_of_a_plain_loop(texts: list[str]) -> None:
    words = hash_words(texts)
    joined = "".join(text.lower() + "\n" for text in texts).encode(errors="surrogatepass")
    for number, text in enumerate(texts):
        first, end = words.firsts[number], words.firsts[number + 1]
        spans = zip(words.starts[first:end], words.ends[first:end], strict=True)
        assert [joined[start:stop].decode(errors="surrogatepass") for start, stop in spans] == python_words(text)


def test_shingles_depend_on_their_words_alone() -> None:
    alone, _ = hash_shingles(["the quick brown fox jumps over"], 3)
    together, offsets = hash_shingles(
        ["something else before", "", "The  quick, brown FOX\njumps over!", "two words"], 3
    )
    assert offsets.tolist() == [0, 1, 1, 5, 6]
    assert together[1:5].tolist() == alone.tolist()
    assert len(set(together.tolist())) == 6


# ------------------------------------------------------------------------------------------------------------- exact


def test_the_first_of_equal_texts_stays(tmp_path: Path) -> None:
    texts = ["a", "b", "a", "", "b", "a ", "", "a"]
    for passes, shards in ((1, 1), (3, 1), (1, 3), (8, 8)):
        finder = ExactDuplicates(SECTION, rows_in_memory=-(-len(texts) // passes))
        assert keepers(finder, texts, tmp_path / f"{passes}{shards}", shards) == [0, 1, 0, 3, 1, 5, 3, 0]


def test_absent_documents_neither_stay_nor_go(tmp_path: Path) -> None:
    texts = ["same text of words"] * 3
    present = [False, True, True]
    for finder in (ExactDuplicates(SECTION), NearDuplicates(SECTION)):
        assert keepers(finder, texts, tmp_path / finder.name, present=present) == [0, 1, 1]


# -------------------------------------------------------------------------------------------------------------- near


def test_signatures_estimate_the_jaccard_similarity() -> None:
    finder = NearDuplicates(DuplicatesSection(num_hashes=512))
    rng = random.Random(1)
    for share in (0.01, 0.03, 0.1):
        (text,) = random_texts(1, 400, seed=int(share * 100))
        edited = edit(text, share, rng)
        one, other = (set(hash_shingles([some], SECTION.shingle_words)[0].tolist()) for some in (text, edited))
        exact = len(one & other) / len(one | other)
        first, second = finder.sign([text, edited])
        assert abs(np.mean(first == second) - exact) < 4 * np.sqrt(exact * (1 - exact) / 512)


def test_edited_copies_go_and_half_copies_stay(tmp_path: Path) -> None:
    rng = random.Random(2)
    texts = random_texts(300, 200)
    copies = [edit(text, 0.02, rng) for text in texts]
    halves = [f"{text[: len(text) // 2]} {other}" for text, other in zip(texts, random_texts(300, 100, 7), strict=True)]
    found = keepers(NearDuplicates(SECTION), [*texts, *copies, *halves], tmp_path)
    assert found[:300] == list(range(300))
    right = sum(keeper == number for number, keeper in enumerate(found[300:600]))
    assert right >= 0.97 * 300
    assert found[600:] == list(range(600, 900))


def test_decisions_depend_on_neither_shards_nor_passes(tmp_path: Path) -> None:
    rng = random.Random(3)
    originals = random_texts(120, 60)
    texts = [edit(rng.choice(originals), rng.choice([0, 0.01, 0.05, 0.08]), rng) for _ in range(500)]
    expected = keepers(NearDuplicates(SECTION), texts, tmp_path / "one")
    assert len(set(expected)) < 400
    for shards, rows in ((3, 10**6), (60, 10**6), (1, 70), (7, 33)):
        finder = NearDuplicates(SECTION, rows_in_memory=rows)
        assert keepers(finder, texts, tmp_path / f"{shards}_{rows}", shards) == expected


def test_documents_behind_an_unlike_first_one_are_compared_too(tmp_path: Path) -> None:
    """The second and third agree in one band only, and there the first, which is unlike both, agrees as well."""
    rows = choose_rows_per_band(SECTION.similarity, SECTION.num_hashes)
    rng = np.random.default_rng(5)
    signatures = rng.integers(0, 2**32, (3, SECTION.num_hashes), dtype=np.uint32)
    signatures[2] = signatures[1]
    signatures[2, ::rows] += 1  # one column of every band
    signatures[:, :rows] = signatures[1, :rows]
    np.save(tmp_path / "0.npy", signatures)
    found = NearDuplicates(SECTION).find_keepers([tmp_path / "0.npy"], np.ones(3, dtype=np.bool_), tmp_path)
    assert found.tolist() == [0, 1, 1]


def test_what_goes_resembles_what_stays(tmp_path: Path) -> None:
    """Each of a chain resembles the one before; a union of all pairs would leave only the first."""
    rng = random.Random(4)
    chain = random_texts(1, 300)
    while len(chain) < 30:
        chain.append(edit(chain[-1], 0.02, rng))
    finder = NearDuplicates(SECTION)
    signatures = finder.sign(chain)
    found = keepers(finder, chain, tmp_path)
    assert 1 < len(set(found)) < 15
    for number, keeper in enumerate(found):
        assert found[keeper] == keeper
        assert keeper <= number
        assert np.mean(signatures[number] == signatures[keeper]) >= SECTION.similarity


def test_texts_without_words_and_short_texts(tmp_path: Path) -> None:
    texts = ["", "...", "Hello, world!", "hello world", "hello", "!!", "中文", "中文。"]
    assert keepers(NearDuplicates(SECTION), texts, tmp_path) == [0, 1, 2, 2, 4, 5, 6, 6]


@pytest.mark.parametrize("finder", [ExactDuplicates(SECTION), NearDuplicates(SECTION)], ids=lambda finder: finder.name)
def test_nothing_and_empty_shards(finder: DuplicateFinder, tmp_path: Path) -> None:
    assert keepers(finder, [], tmp_path / "none", shards=3) == []
    assert keepers(finder, ["a b c", "a b c"], tmp_path / "some", shards=9) == [0, 0]


def test_bands_find_nearly_all_pairs_at_the_threshold() -> None:
    for threshold in (0.3, 0.5, 0.65, 0.8, 0.95):
        rows = choose_rows_per_band(threshold, 128)
        assert (1 - threshold**rows) ** (128 // rows) <= 0.01 < (1 - threshold ** (rows + 1)) ** (128 // (rows + 1))
