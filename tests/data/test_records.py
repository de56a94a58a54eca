"""Conversations as a corpus: what is written comes back in rows, each once, with the losses on the right tokens."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_7b.config.schema import DataConfig
from megatron_7b.data.conversations.reading import NAME, read_conversations
from megatron_7b.data.conversations.trained import ConversationEncoder
from megatron_7b.data.records.corpus import EncodedRecord, RecordCorpus, write_records
from megatron_7b.data.records.reading import as_line, parse_record
from megatron_7b.data.records.rows import RecordDataset, RecordLayout, open_records
from megatron_7b.data.samples.sample_order import Reached
from megatron_7b.data.samples.sets import has_split, whole_corpus
from megatron_7b.data.upkeep.quick_check import check_corpora
from megatron_7b.errors import ConfigError, DataFormatError
from megatron_7b.tokenizer import load_tokenizer
from megatron_7b.tokenizer.chat_template import ChatTemplate
from megatron_7b.tokenizer.default_chat_template import default_chat_template
from tests.support.commands import run_command

TOKENIZER = load_tokenizer("bytes")
ENCODER = ConversationEncoder(TOKENIZER, ChatTemplate(TOKENIZER, default_chat_template(TOKENIZER)))
SEQ_LENGTH = 192


def conversations(count: int, first: int = 0) -> list[list[dict[str, str]]]:
    """Conversations of one to three turns, of which no two are alike."""
    return [
        [
            message
            for turn in range(1 + number % 3)
            for message in (
                {"role": "user", "content": f"question {number}.{turn}"},
                {"role": "assistant", "content": f"answer {number}.{turn}"},
            )
        ]
        for number in range(first, first + count)
    ]


def write(folder: Path, name: str, messages: list[list[dict[str, str]]]) -> str:
    file = folder / f"{name}.jsonl"
    file.write_text("\n".join(json.dumps({"messages": one}) for one in messages))
    encode(file, str(folder / name))
    return str(folder / name)


def encode(file: Path, prefix: str) -> None:
    records = (one.record for _, one in read_conversations(file, ENCODER.encode))
    write_records(records, prefix, TOKENIZER, source=file, kind=NAME, options={})


def layout(**changes: object) -> RecordLayout:
    return replace(RecordLayout(seq_length=SEQ_LENGTH, seed=1, packed=True, pad_id=258, name=NAME), **changes)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write(tmp_path_factory.mktemp("chat"), "it", conversations(30))


def config(*train: str, **others: object) -> DataConfig:
    return DataConfig(train=train, seq_length=SEQ_LENGTH, split="1", **others)  # type: ignore[arg-type]


def texts(dataset: RecordDataset, indices: range) -> list[str]:
    """What the conversations of some samples say, one text each."""
    batch = dataset.batch(indices)
    assert batch.cu_seqlens is not None
    pieces = np.split(batch.tokens.ravel(), batch.cu_seqlens[1:-1])
    return [TOKENIZER.decode(piece.tolist()) for piece in pieces if (piece != TOKENIZER.pad_id).any()]


@pytest.mark.parametrize("packed", [True, False])
def test_an_epoch_has_each_conversation_once(corpus: str, packed: bool):
    dataset = open_records(config(corpus), "train", layout(packed=packed))
    assert dataset.num_samples == 30 or packed
    expected = sorted(TOKENIZER.decode(RecordCorpus(corpus).dataset.document(i).tolist()) for i in range(30))
    for epoch in range(2):
        start = epoch * dataset.num_samples
        assert sorted(texts(dataset, range(start, start + dataset.num_samples))) == expected
    assert texts(dataset, range(3)) != texts(dataset, range(dataset.num_samples, dataset.num_samples + 3))


def test_the_loss_is_on_the_replies_and_their_ends(corpus: str):
    dataset = open_records(config(corpus), "train", layout())
    batch = dataset.batch(range(dataset.num_samples))
    trained = TOKENIZER.decode(batch.labels[batch.loss_mask > 0].tolist())
    assert sorted(trained.replace("answer", "|answer").split("|")[1:]) == sorted(
        message["content"] for one in conversations(30) for message in one if message["role"] == "assistant"
    )
    ends = batch.labels[batch.loss_mask > 0] == TOKENIZER.eod_id
    assert ends.sum() == trained.count("answer")
    assert (batch.labels[:, :-1] == batch.tokens[:, 1:])[batch.loss_mask[:, :-1] > 0].all()


def test_a_number_is_all_the_state(corpus: str, tmp_path: Path):
    other = write(tmp_path, "other", conversations(7, first=100))
    blend = config("3", corpus, "1", other)
    dataset, again = (open_records(blend, "train", layout()) for _ in range(2))
    np.testing.assert_array_equal(dataset.batch([41, 7]).tokens, again.batch(range(50)).tokens[[41, 7]])
    resumed = open_records(blend, "train", layout(), reached=Reached(20, dataset.order), contents={})
    np.testing.assert_array_equal(resumed.batch(range(20, 40)).tokens, dataset.batch(range(20, 40)).tokens)
    with pytest.raises(ConfigError, match="would not continue those that were read"):
        open_records(config(other), "train", layout(seed=2), reached=Reached(20, dataset.order))


def test_another_set_may_join_and_the_first_continues_where_it_was(corpus: str, tmp_path: Path):
    other = write(tmp_path, "other", conversations(7, first=100))
    alone = open_records(config(corpus), "train", layout(packed=False))
    blend = config("1", corpus, "1", other)
    joined = open_records(blend, "train", layout(packed=False), reached=Reached(20, alone.order))
    read = texts(joined, range(20, 24))
    assert [text for text in read if "question 10" not in text] == texts(alone, range(20, 22))


def test_long_conversations_end_with_a_reply(tmp_path: Path):
    turns = [
        {"role": role, "content": f"{role} {turn} " + "x" * 20} for turn in range(6) for role in ("user", "assistant")
    ]
    long = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "y" * 500}]
    prefix = write(tmp_path, "it", [turns, long, conversations(1)[0]])
    dataset = RecordDataset(whole_corpus(prefix), layout(seq_length=128, packed=False), shuffle=False)
    first, second, third = texts(dataset, range(3))
    assert first.endswith("assistant 0 " + "x" * 20)
    assert second.endswith("y" * 50)
    assert third.endswith("answer 0.0\n")
    assert "2 conversations of" in dataset.notes[0]


def test_splits_are_of_whole_conversations(corpus: str):
    shares = DataConfig(train=(corpus,), seq_length=SEQ_LENGTH, split="80,20,0")
    valid = open_records(shares, "valid", layout(packed=False))
    assert valid.num_samples == 6
    assert has_split(shares, "valid", window_length=0)
    assert not has_split(DataConfig(train=(corpus,), split="99,1,0"), "valid", window_length=0)


def test_a_mask_that_was_changed_or_is_gone_is_noticed(corpus: str, tmp_path: Path):
    prefix = write(tmp_path, "it", conversations(4))
    assert run_command("data", "verify", prefix).returncode == 0
    mask = Path(prefix + ".mask")
    content = bytearray(mask.read_bytes())
    content[5] ^= 1
    mask.write_bytes(content)
    (checked,) = check_corpora([prefix], full=False)
    assert "xxh3_128" in checked.problems[0]
    assert ".mask" in run_command("data", "verify", prefix).stderr
    mask.write_bytes(content[:-2])
    with pytest.raises(DataFormatError, match="two for each token"):
        RecordCorpus(prefix)
    mask.unlink()
    with pytest.raises(DataFormatError, match="is a corpus of text"):
        RecordCorpus(prefix)


def test_nothing_is_left_of_a_file_with_mistakes(tmp_path: Path):
    file = tmp_path / "it.jsonl"
    file.write_text(json.dumps({"messages": conversations(1)[0]}) + '\n{"messages": []}')
    with pytest.raises(DataFormatError, match="1 of 2 conversations cannot be used"):
        encode(file, str(tmp_path / "out" / "it"))
    assert list((tmp_path / "out").iterdir()) == []


def pairs(file: Path, count: int, first_length: int) -> str:
    """Records of two parts with two values each; the first record is longer than the others."""
    records = [
        EncodedRecord(
            [np.arange(first_length if number == 0 else 3) + number, np.arange(4) + 100 + number],
            values=np.array([number, -number]),
        )
        for number in range(count)
    ]
    file.touch()
    write_records(records, str(file.with_suffix("")), TOKENIZER, source=file, kind="pairs", options={})
    return str(file.with_suffix(""))


@pytest.mark.parametrize("packed", [True, False])
def test_records_of_several_parts_with_values(tmp_path: Path, packed: bool):
    prefix = pairs(tmp_path / "it.jsonl", count=5, first_length=20)
    dataset = RecordDataset(
        whole_corpus(prefix), layout(seq_length=16, packed=packed, name="pairs", pad_id=7), shuffle=False
    )
    assert "1 pairs of" in dataset.notes[0]  # too long, and left out whole
    assert "left out" in dataset.notes[0]
    batch = dataset.batch(range(dataset.num_samples))
    records, flat = batch.records, batch.tokens.ravel()
    assert records is not None
    assert records.values.tolist() == [[number, -number] for number in range(1, 5)]
    assert records.record.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    parts = [
        flat[begin : begin + length].tolist() for begin, length in zip(records.begins, records.lengths, strict=True)
    ]
    assert parts == [part for n in range(1, 5) for part in ([n, n + 1, n + 2], [n + 100, n + 101, n + 102, n + 103])]
    assert set(records.begins.tolist()) < set(np.asarray(batch.cu_seqlens).tolist())
    labels = batch.labels.ravel()
    assert labels[records.begins[1] :][:4].tolist() == [102, 103, 104, 7]  # no part predicts the next one
    assert run_command("data", "verify", prefix).returncode == 0
    values = Path(prefix + ".values")
    values.write_bytes(values.read_bytes()[:-4])
    with pytest.raises(DataFormatError, match="as many for each record"):
        RecordCorpus(prefix)
    with pytest.raises(DataFormatError, match="is a corpus of pairs, expected conversations"):
        RecordDataset(whole_corpus(prefix), layout())


def test_a_record_comes_out_as_it_went_in_whatever_its_characters() -> None:
    for record in ({"text": "naïve 猫\u2028"}, {"id": "\ud83d", "text": "é"}):
        line = as_line(record)
        assert line.endswith("\n")
        assert parse_record(line.encode()) == record
