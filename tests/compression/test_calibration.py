"""Text to calibrate with: each kind of file, the same samples each time, and what is said of what does not fit."""

import json
from pathlib import Path

import pytest

from megatron_7b.compression import read_calibration
from megatron_7b.data import PreprocessOptions, preprocess_files, train_tokenizer
from megatron_7b.errors import ConfigError, DataFormatError, MegatronError, PathError
from megatron_7b.tokenizer import BpeOptions, load_tokenizer

BYTES = load_tokenizer("bytes")
CHAT = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'


def lines(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def test_samples_are_spread_and_do_not_overlap(tmp_path: Path) -> None:
    file = lines(tmp_path / "a.jsonl", *({"text": chr(97 + number) * 9} for number in range(20)))
    samples = read_calibration(file, BYTES, 5, 10)
    assert samples == read_calibration(file, BYTES, 5, 10)
    assert [len(sample) for sample in samples] == [10] * 5
    assert BYTES.decode(samples[0]).startswith("a")
    assert "t" in BYTES.decode(samples[-1])
    everything = read_calibration(file, BYTES, 20, 10)
    end = [] if BYTES.eod_id is None else [BYTES.eod_id]
    assert everything[3] == [*BYTES.encode("d" * 9), *end][:10]


def test_plain_text_and_a_corpus_give_the_same(tmp_path: Path) -> None:
    text = "We hold these truths to be self-evident. " * 40
    (tmp_path / "a.txt").write_text(text)
    lines(tmp_path / "b.jsonl", {"text": text})
    preprocess_files([tmp_path / "b.jsonl"], tmp_path / "c", BYTES, PreprocessOptions(append_eod=True))
    plain = read_calibration(tmp_path / "a.txt", BYTES, 4, 64)
    assert plain == read_calibration(tmp_path / "b.jsonl", BYTES, 4, 64)
    assert plain == read_calibration(tmp_path / "c", BYTES, 4, 64)
    assert plain == read_calibration(tmp_path / "c_text_document.bin", BYTES, 4, 64)


def test_conversations_are_spelled_out(tmp_path: Path) -> None:
    lines(tmp_path / "words.jsonl", {"text": "hello there, good day to you"})
    train_tokenizer([tmp_path / "words.jsonl"], tmp_path / "tok", BpeOptions(vocab_size=260))
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    (tmp_path / "tok" / "chat_template.jinja").write_text(template)
    tokenizer = load_tokenizer(tmp_path / "tok")
    messages = [{"role": "user", "content": "hello there"}, {"role": "assistant", "content": "good day"}]
    file = lines(tmp_path / "chat.jsonl", *[{"messages": messages}] * 8)
    (sample,) = read_calibration(file, tokenizer, 1, 40)
    assert "hello there" in tokenizer.decode(sample)
    pair = lines(tmp_path / "pairs.jsonl", *[{"prompt": "hello there", "completion": "good day"}] * 8)
    assert read_calibration(pair, tokenizer, 1, 40) == [sample]


@pytest.mark.parametrize(
    ("content", "kind", "says"),
    [
        (None, PathError, "does not exist"),
        ('{"text": "short"}\n', ConfigError, "--num-samples|more text"),
        ('{"title": "short"}\n', DataFormatError, "has no text to calibrate with"),
        ("nothing of JSON\n", DataFormatError, "has no text to calibrate with"),
        (CHAT, ConfigError, "chat template"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_said(content: str | None, kind: type[MegatronError], says: str, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    if content is not None:
        file.write_text(content)
    with pytest.raises(kind, match=says):
        read_calibration(file, BYTES, 4, 32)


def test_numbers_are_positive(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="0 samples of 8 tokens"):
        read_calibration(tmp_path / "a.txt", BYTES, 0, 8)
