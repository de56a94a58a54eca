"""Resumed runs read exactly what their earlier lives left, whatever happened to the blend; or they are refused."""

import json
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_7b.config.schema import DataConfig
from megatron_7b.data import Dataset, IndexedDataset, open_split
from megatron_7b.data.corpus.fingerprint import corpus_spots
from megatron_7b.data.samples.sample_order import Reached, SampleOrder
from megatron_7b.errors import ConfigError
from tests.data.corpora import write_corpus

SEQ_LENGTH = 8
IDS_PER_SET = 10_000


def write_set(folder: Path, number: int, num_documents: int, *, length: int = 10) -> str:
    """A corpus in which every id occurs once, and tells the set."""
    starts = range(number * IDS_PER_SET, number * IDS_PER_SET + num_documents * length, length)
    documents = [list(range(start, start + length)) for start in starts]
    return write_corpus(folder / f"set{number}", documents, token_bytes=4)


@pytest.fixture(scope="module")
def prefixes(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("sets")
    return [write_set(folder, number, count) for number, count in enumerate((40, 12, 25, 7))]


def open_life(config: DataConfig, reached: Reached | None = None, *, seed: int = 3) -> Dataset:
    """The training samples, as a run with these settings opens them."""
    words = config.train if len(config.train) == 1 else config.train[1::2]
    contents = {prefix: corpus_spots(prefix).fingerprint for prefix in words}
    return open_split(config, "train", seed=seed, contents=contents, reached=reached)


def left_behind(dataset: Dataset, consumed: int) -> Reached:
    """What a checkpoint tells the next life, through JSON as in its file."""
    return Reached(consumed, SampleOrder.from_dict(json.loads(json.dumps(dataset.order.to_dict()))))


def settings(prefixes: Sequence[str], weights: Sequence[int], **fields: object) -> DataConfig:
    words = [word for weight, prefix in zip(weights, prefixes, strict=True) for word in (str(weight), prefix)]
    return replace(DataConfig(train=tuple(words), split="1", seq_length=SEQ_LENGTH), **fields)  # type: ignore[arg-type]


def first_ids(dataset: Dataset, begin: int, end: int) -> list[int]:
    """What the samples `begin` to `end` begin with, which tells a sample of one epoch from all others."""
    return [int(one) for one in dataset.batch(range(begin, end)).tokens[:, 0]] if end > begin else []


BLENDS = st.lists(
    st.tuples(st.permutations(range(4)), st.integers(1, 4), st.lists(st.integers(1, 5), min_size=4, max_size=4)),
    min_size=1,
    max_size=5,
)


@given(BLENDS, st.data())
def test_every_set_is_read_in_order_without_gap_or_repetition(
    prefixes: list[str], lives: list[tuple[list[int], int, list[int]]], data: st.DataObject
) -> None:
    """Each life has other sets, in another sequence, with other weights; a set that comes back continues."""
    read: dict[int, list[int]] = {number: [] for number in range(4)}
    numbers: dict[int, int] = {}
    reached, consumed = None, 0
    for order, count, weights in lives:
        chosen = order[:count]
        dataset = open_life(settings([prefixes[one] for one in chosen], weights[:count]), reached)
        end = consumed + data.draw(st.integers(0, 60))
        for first in first_ids(dataset, consumed, end):
            read[first // IDS_PER_SET].append(first)
        if end > 0:
            for one, of_set in zip(chosen, dataset.order.sets, strict=True):
                assert numbers.setdefault(one, of_set.number) == of_set.number
        consumed, reached = end, left_behind(dataset, end)
    for one, ids in read.items():
        if ids:
            undisturbed = open_alone(prefixes[one], numbers[one])
            assert ids == first_ids(undisturbed, 0, len(ids))


def open_alone(prefix: str, number: int) -> Dataset:
    """One set as a run reads it that reads nothing else, in the order of the set of this number."""
    order = open_life(settings([prefix], [1])).order
    with_number = replace(order, sets=(replace(order.sets[0], number=number),))
    return open_life(settings([prefix], [1]), Reached(1, with_number))


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=6), st.data())
def test_bounds_count_what_earlier_lives_have_read(
    prefixes: list[str], lives: list[tuple[int, int]], data: st.DataObject
) -> None:
    """However the weights change, each set gives each of its tokens once and then ends, and the others take over."""
    reached, consumed, inputs = None, 0, Counter[int]()
    ends = {open_life(settings(prefixes[:2], weights, max_epochs=(1,)), None).end for weights in ((1, 1), *lives)}
    (end,) = ends  # The bound does not depend on the weights.
    assert end is not None
    for number, weights in enumerate(lives):
        dataset = open_life(settings(prefixes[:2], weights, max_epochs=(1,)), reached)
        assert dataset.end == end
        upto = end if number == len(lives) - 1 else data.draw(st.integers(consumed, end))
        if upto > consumed:
            inputs.update(dataset.batch(range(consumed, upto)).tokens.ravel().tolist())
        consumed, reached = upto, left_behind(dataset, upto)
    every = {int(one) for prefix in prefixes[:2] for sequence in IndexedDataset(prefix) for one in sequence}
    assert set(inputs) == every
    # The last sample of an epoch reaches into the next one: fewer than s tokens of each set come again.
    assert sum(inputs.values()) - len(every) < 2 * SEQ_LENGTH
    with pytest.raises(IndexError):
        dataset.batch([end])


def test_unchanged_settings_go_on_with_the_same_numbers(prefixes: list[str], tmp_path: Path) -> None:
    config = settings(prefixes[:3], (5, 3, 2))
    whole = open_life(config).batch(range(100)).tokens
    for consumed in (1, 37, 99):
        resumed = open_life(config, left_behind(open_life(config), consumed))
        assert resumed.notes == ()
        np.testing.assert_array_equal(resumed.batch(range(consumed, 100)).tokens, whole[consumed:])
    # Weights in the same proportion, corpora in another place, and options of what samples look like change nothing.
    moved = [str(tmp_path / Path(prefix).name) for prefix in prefixes[:3]]
    for old, new in zip(prefixes, moved, strict=False):
        for suffix in (".bin", ".idx"):
            shutil.copy(old + suffix, new + suffix)
    same = settings(moved, (10, 6, 4), reset_attention_mask=True)
    resumed = open_life(same, left_behind(open_life(config), 37))
    assert resumed.notes == ()
    np.testing.assert_array_equal(resumed.batch(range(37, 100)).tokens, whole[37:])
    assert [part.prefix for part in resumed.parts] == moved


def test_what_cuts_or_shuffles_otherwise_is_refused_unless_restarted(prefixes: list[str], tmp_path: Path) -> None:
    prefix = write_set(tmp_path, 0, 40)
    config = settings([prefix, prefixes[1]], (1, 1), split="90,10")
    reached = left_behind(open_life(config), 20)

    def refusal(changed: DataConfig, seed: int = 3) -> str:
        with pytest.raises(ConfigError) as raised:
            open_life(changed, reached, seed=seed)
        assert "initialize-from" in str(raised.value)
        return str(raised.value)

    assert "data.seq_length is 16, the run had 8" in refusal(replace(config, seq_length=16))
    assert "training.seed is 4, the run had 3" in refusal(config, seed=4)
    assert "documents 0 to 20 of" in refusal(replace(config, split="50,50"))
    assert "the run had 0 to 36 (data.split, data.valid)" in refusal(replace(config, split="50,50"))
    write_set(tmp_path, 0, 41)  # one document appended
    assert f"{prefix} is not the corpus that was read: 370 tokens for training, the run had 360" in refusal(config)
    write_set(tmp_path, 0, 40)
    contents = Path(f"{prefix}.bin").read_bytes()
    Path(f"{prefix}.bin").write_bytes(contents[::-1])
    assert "and their content differs" in refusal(config)
    # A corpus that was repaired while the run was saved.
    repaired = open_life(replace(config, on_order_change="trust"), reached)
    assert repaired.order.sets[0].content == corpus_spots(prefix).fingerprint
    assert repaired.order.first_sample == 0
    assert "data.seq_length is 16" in refusal(replace(config, seq_length=16, on_order_change="trust"))
    Path(f"{prefix}.bin").write_bytes(contents)
    # The share that is not for training does not matter.
    assert open_life(replace(config, split="90,5,5"), reached).notes == ()


def test_a_restart_is_a_whole_pass_in_a_new_order_and_happens_once(prefixes: list[str]) -> None:
    config = settings(prefixes[:1], (1,))
    before = open_life(config)
    longer = replace(config, seq_length=16, on_order_change="restart")
    restarted = open_life(longer, left_behind(before, 20))
    assert "from sample 20 on" in restarted.notes[0]
    with pytest.raises(ValueError, match="sample number 19"):
        restarted.batch([19])
    tokens = restarted.batch(range(20, 20 + restarted.num_samples)).tokens
    assert len(np.unique(tokens)) == 400  # every token of the set, each once
    fresh = open_life(replace(longer, on_order_change="refuse"))
    assert (tokens != fresh.batch(range(fresh.num_samples)).tokens).any()
    # The same command continues: it does not restart again.
    again = open_life(longer, left_behind(restarted, 30))
    assert again.notes == ()
    np.testing.assert_array_equal(again.batch(range(30, 40)).tokens, restarted.batch(range(30, 40)).tokens)


def test_a_run_that_has_read_nothing_may_change_everything(prefixes: list[str]) -> None:
    before = open_life(settings(prefixes[:2], (1, 1)))
    changed = settings(prefixes[2:], (1, 2), seq_length=16)
    assert open_life(changed, left_behind(before, 0)).order == open_life(changed).order


def test_the_same_corpus_twice_in_a_blend(prefixes: list[str]) -> None:
    before = open_life(settings([prefixes[0], prefixes[0]], (1, 3)))
    after = open_life(settings([prefixes[0], prefixes[0]], (1, 1)), left_behind(before, 8))
    assert [one.consumed for one in after.order.sets] == [2, 6]


def test_a_checkpoint_that_does_not_say_compares_what_is_known(prefixes: list[str]) -> None:
    config = settings(prefixes[:2], (1, 1))
    assert open_life(config, Reached(10, None)).order == open_life(config).order
    different = Reached(10, None, ("data.split is 1, the run had 98,2,0",))
    with pytest.raises(ConfigError, match="the run had 98,2,0"):
        open_life(config, different)
    assert open_life(replace(config, on_order_change="restart"), different).order.pass_begin == 10


def test_a_corpus_is_known_by_its_place_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was tokenised again is not taken for another set because its path is written otherwise."""
    prefix = write_set(tmp_path, 0, 40)
    reached = left_behind(open_life(settings([prefix], (1,))), 20)
    write_set(tmp_path, 0, 41)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="set0 is not the corpus that was read"):
        open_life(settings(["set0"], (1,)), reached)
    write_set(tmp_path, 0, 40)
    assert open_life(settings(["set0"], (1,)), reached).notes == ()
