"""Fill-in-the-middle: it can be put back, equals a slow reference, and follows from the sample's number."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_7b.config.schema import DataConfig
from megatron_7b.data import open_split
from megatron_7b.data._index import Batcher, FillInTheMiddle
from megatron_7b.data.corpus.indexed_dataset import IndexedDataset
from megatron_7b.data.samples.fill_in_the_middle import find_fim_ids
from megatron_7b.data.samples.sampling import open_stream
from megatron_7b.errors import ConfigError
from megatron_7b.tokenizer import load_tokenizer
from tests.data.corpora import ReferenceStream, mix, random_documents, write_corpus

PREFIX, MIDDLE, SUFFIX, EOD = 2000, 2001, 2002, 2003
IDS = (PREFIX, MIDDLE, SUFFIX)


def permuted(ids: list[int], *, rate: float, spm_rate: float, key: int) -> list[int]:
    """One document, written down plainly."""
    if len(ids) <= 3 or (mix(key, 0) >> 11) * 2.0**-53 >= rate:
        return ids
    kept = ids[:-3]
    first, second = sorted(mix(key, purpose) % (len(kept) + 1) for purpose in (2, 3))
    prefix, middle, suffix = kept[:first], kept[first:second], kept[second:]
    if (mix(key, 1) >> 11) * 2.0**-53 < spm_rate:
        return [PREFIX, SUFFIX, *suffix, MIDDLE, *prefix, *middle]
    return [PREFIX, *prefix, SUFFIX, *suffix, MIDDLE, *middle]


def put_back(ids: list[int]) -> list[int]:
    """The original without its last three tokens, from what was permuted; SPM needs no more than PSM does."""
    assert ids[0] == PREFIX
    suffix_at, middle_at = ids.index(SUFFIX), ids.index(MIDDLE)
    before, suffix, after = ids[1:suffix_at], ids[suffix_at + 1 : middle_at], ids[middle_at + 1 :]
    return before + after + suffix


def split_rows(rows: np.ndarray, begins: np.ndarray) -> list[list[list[int]]]:
    """The documents of each row."""
    return [
        [part.tolist() for part in np.split(row, np.flatnonzero(begin[1:]) + 1)]
        for row, begin in zip(rows, begins, strict=True)
    ]


@given(
    seed=st.integers(0, 1000),
    seq_length=st.integers(2, 40),
    key=st.integers(0, 2**64 - 1),
    rate=st.sampled_from([0.0, 0.3, 1.0]),
    spm_rate=st.sampled_from([0.0, 0.5, 1.0]),
    has_eod=st.booleans(),
)
def test_it_equals_the_reference_and_can_be_put_back(
    tmp_path_factory: pytest.TempPathFactory,
    seed: int,
    seq_length: int,
    key: int,
    rate: float,
    spm_rate: float,
    has_eod: bool,
) -> None:
    documents = [[*ids, EOD] if has_eod else ids for ids in [*random_documents(seed, 6), list(range(41))]]
    dataset = IndexedDataset(write_corpus(tmp_path_factory.mktemp("c") / "a", documents))
    fim = FillInTheMiddle(
        rate=rate,
        spm_rate=spm_rate,
        prefix_id=PREFIX,
        middle_id=MIDDLE,
        suffix_id=SUFFIX,
        eod_id=EOD if has_eod else None,
        key=key,
    )
    stream = open_stream(dataset, seq_length=seq_length, key=7)
    tokens, labels, _, _, _ = Batcher([stream], seq_length=seq_length, fill_in_the_middle=fim).assemble(np.arange(12))
    plain = ReferenceStream(documents, seq_length, 7)
    originals = split_rows(plain.samples(12), plain.document_begins(12))
    actual = split_rows(np.concatenate([tokens, labels[:, -1:]], axis=1), plain.document_begins(12))
    for sample, (before, after) in enumerate(zip(originals, actual, strict=True)):
        for number, (original, written) in enumerate(zip(before, after, strict=True)):
            content = original[:-1] if has_eod and original[-1] == EOD else original
            tail = original[len(content) :]
            document_key = mix(mix(mix(key, 0), sample), number)
            assert written == permuted(content, rate=rate, spm_rate=spm_rate, key=document_key) + tail
            if PREFIX in written:
                assert put_back(written[: len(content)]) == content[:-3]
            else:
                assert written == original


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    prefix = write_corpus(tmp_path / "a", [[*ids, EOD] for ids in random_documents(1, 400, max_length=600)])
    return DataConfig(train=(prefix,), split="90,10", seq_length=256, fim_rate=0.5, fim_spm_rate=0.25)


def test_rates_are_kept(config: DataConfig) -> None:
    dataset = open_split(replace(config, reset_attention_mask=True), "train", seed=1, eod_id=EOD, fim_ids=IDS)
    batch = dataset.batch(range(4 * dataset.num_samples))
    assert batch.cu_seqlens is not None
    ids, starts = batch.tokens.ravel(), batch.cu_seqlens[:-1]
    long_enough = np.diff(batch.cu_seqlens) > 20
    is_permuted = ids[starts[long_enough]] == PREFIX
    assert abs(is_permuted.mean() - 0.5) < 0.04
    spm = ids[starts[long_enough] + 1][is_permuted] == SUFFIX
    assert 0.2 < spm.mean() < 0.33  # A quarter, and PSM with an empty prefix.


def test_it_follows_from_seed_and_number(config: DataConfig) -> None:
    first, again = (open_split(config, "train", seed=1, eod_id=EOD, fim_ids=IDS) for _ in range(2))
    whole = first.batch(range(100)).tokens
    np.testing.assert_array_equal(again.batch(range(60, 64)).tokens, whole[60:64])
    plain = open_split(replace(config, fim_rate=0.0), "train", seed=1).batch(range(100)).tokens
    assert (plain != whole).any(axis=1).mean() > 0.5
    np.testing.assert_array_equal(plain == EOD, whole == EOD)
    epoch = first.num_samples
    assert (first.batch(range(epoch)).tokens == PREFIX).sum() != (
        first.batch(range(epoch, 2 * epoch)).tokens == PREFIX
    ).sum()


def test_validation_data_stays_as_it_is(config: DataConfig) -> None:
    batch = open_split(config, "valid", seed=1, eod_id=EOD, fim_ids=IDS).batch(range(20))
    assert not np.isin(batch.tokens, IDS).any()


def test_the_tokens_are_those_of_the_tokenizer(config: DataConfig, trained_tokenizer: Path) -> None:
    tokenizer = load_tokenizer(trained_tokenizer)
    ids = find_fim_ids(config, tokenizer)
    assert ids is not None
    assert [tokenizer.decode([one]) for one in ids] == list(config.fim_tokens)
    assert find_fim_ids(replace(config, fim_rate=0.0), None) is None
    with pytest.raises(ConfigError, match="'<gap>', which is not one token"):
        find_fim_ids(replace(config, fim_tokens=("<gap>", *config.fim_tokens[1:])), tokenizer)
    with pytest.raises(ConfigError, match="three different"):
        find_fim_ids(replace(config, fim_tokens=(config.fim_tokens[0],) * 3), tokenizer)
    with pytest.raises(ConfigError, match="no tokenizer is known"):
        find_fim_ids(config, None)
    with pytest.raises(ConfigError, match="are not known"):
        open_split(config, "train", seed=1)


@pytest.fixture
def trained_tokenizer(tmp_path: Path) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = list(DataConfig().fim_tokens)
    tokenizer.train_from_iterator(["some text"], trainers.BpeTrainer(vocab_size=300, special_tokens=special))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"
