"""`megatron-7b data verify`: every kind of damage is found and named."""

import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import xxhash

from megatron_7b.cli.commands import data
from megatron_7b.data import IndexWriter
from megatron_7b.data.corpus import scan as corpus_scan
from megatron_7b.data.upkeep.adopt import adopt_corpus
from megatron_7b.tokenizer import load_tokenizer
from tests.data.corpora import random_documents, write_corpus

DOCUMENTS = [[1, 2, 3], [], [4, 255], [6, 7, 8, 9], [0]]


def write_with_manifest(prefix: Path, documents: list[list[int]] = DOCUMENTS) -> str:
    written = write_corpus(prefix, documents)
    adopt_corpus(written, load_tokenizer("bytes"), advance=lambda _: None)
    return written


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    return write_with_manifest(tmp_path / "a")


def verify(capsys: pytest.CaptureFixture[str], *prefixes: str) -> tuple[int, list[dict[str, Any]]]:
    """The exit code, and the reports."""
    code = data.main(["verify", *prefixes, "--json"])
    reports: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    return code, reports


def problems_of(capsys: pytest.CaptureFixture[str], prefix: str) -> dict[str, dict[str, str]]:
    code, (report,) = verify(capsys, prefix)
    assert code == (1 if report["problems"] else 0)
    assert report["ok"] is not bool(report["problems"])
    return {f"{Path(one['file']).suffix} {one['what']}": one for one in report["problems"]}


def edit_manifest(prefix: str, path: str, value: object) -> None:
    file = Path(f"{prefix}.json")
    content = json.loads(file.read_text())
    section = content
    *sections, name = path.split(".")
    for one in sections:
        section = section[one]
    section[name] = value
    file.write_text(json.dumps(content))


def flip(file: Path, position: int) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(content)


def test_a_good_corpus(corpus: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert data.main(["verify", corpus]) == 0
    output = capsys.readouterr()
    assert "5 documents, 10 tokens: good" in output.out
    assert output.err == ""


def test_a_flipped_bit_is_found(corpus: str, capsys: pytest.CaptureFixture[str]) -> None:
    for suffix, stride in ((".bin", 3), (".idx", 7)):
        file = Path(corpus + suffix)
        for position in range(0, file.stat().st_size, stride):
            flip(file, position)
            assert f"{suffix} xxh3_128" in problems_of(capsys, corpus)
            flip(file, position)
    file = Path(f"{corpus}.json")
    for word in (b'"bytes:', b'"job_hash"'):  # which neither hashes nor counts of the files would show
        place = file.read_bytes().index(word) + len(word) - 2
        flip(file, place)
        assert ".json" in " ".join(problems_of(capsys, corpus))
        flip(file, place)
    assert problems_of(capsys, corpus) == {}


def test_files_cut_short_or_missing(corpus: str, capsys: pytest.CaptureFixture[str]) -> None:
    file = Path(f"{corpus}.bin")
    content = file.read_bytes()
    file.write_bytes(content[:-3])
    problems = problems_of(capsys, corpus)
    assert (problems[".bin size in bytes"]["expected"], problems[".bin size in bytes"]["found"]) == ("20", "17")
    assert ".idx structure" in problems
    file.unlink()
    assert "No such file" in problems_of(capsys, corpus)[".bin reading"]["found"]


@pytest.mark.parametrize(
    ("path", "value", "problem", "found"),
    [
        ("counts.documents", 6, ".idx documents", "5"),
        ("counts.sequences", 6, ".idx sequences", "5"),
        ("counts.tokens", 11, ".idx tokens", "10"),
        ("counts.empty_documents", 0, ".idx empty documents", "1"),
        ("counts.max_id", 254, ".bin range of the ids", "0 to 255"),
        ("token_bytes", 4, ".idx type of the ids", "uint16"),
        ("bin.xxh3_128", "0" * 32, ".bin xxh3_128", None),
        ("idx.size", 1, ".idx size in bytes", None),
    ],
)
def test_a_manifest_that_differs(
    corpus: str, capsys: pytest.CaptureFixture[str], path: str, value: object, problem: str, found: str | None
) -> None:
    edit_manifest(corpus, path, value)
    problems = problems_of(capsys, corpus)
    assert problem in problems
    assert found in (None, problems[problem]["found"])


def test_ids_beyond_the_vocabulary(corpus: str, capsys: pytest.CaptureFixture[str]) -> None:
    edit_manifest(corpus, "tokenizer.vocab_size", 8)
    problem = problems_of(capsys, corpus)[".bin ids"]
    assert problem["expected"] == "0 to 7, the vocabulary"
    assert problem["found"] == "3 outside, the first 255 at token 4 (document 2)"
    assert data.main(["verify", corpus]) == 1
    assert "3 outside" in capsys.readouterr().err


def test_negative_ids(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prefix = write_corpus(tmp_path / "a", [[1, 2], [3]], token_bytes=4)
    adopt_corpus(prefix, load_tokenizer("bytes"), advance=lambda _: None)
    np.array([1, 2, -3], np.int32).tofile(f"{prefix}.bin")
    assert "1 outside, the first -3 at token 2 (document 1)" in problems_of(capsys, prefix)[".bin ids"]["found"]


@pytest.mark.parametrize(
    "content",
    [b"", b"[1]", b'{"tokenizer": {}}', b"\xff", b"null"],
)
def test_a_manifest_that_is_none(corpus: str, capsys: pytest.CaptureFixture[str], content: bytes) -> None:
    Path(f"{corpus}.json").write_bytes(content)
    assert list(problems_of(capsys, corpus)) == [".json reading"]


@pytest.mark.parametrize("value", ["10", 1.5, True, None, [10]])
def test_a_manifest_with_a_wrong_type(corpus: str, capsys: pytest.CaptureFixture[str], value: object) -> None:
    edit_manifest(corpus, "counts.tokens", value)
    assert "tokens is" in problems_of(capsys, corpus)[".json reading"]["found"]


def test_a_manifest_of_another_version(corpus: str, capsys: pytest.CaptureFixture[str]) -> None:
    edit_manifest(corpus, "format_version", 2)
    assert "format version 2, expected 1" in problems_of(capsys, corpus)[".json reading"]["found"]


def test_without_a_manifest_only_the_structure(corpus: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path(f"{corpus}.json").unlink()
    assert data.main(["verify", corpus]) == 0
    output = capsys.readouterr()
    assert "structure good" in output.out
    assert "data adopt" in output.err
    Path(f"{corpus}.bin").write_bytes(b"12")
    assert ".idx structure" in problems_of(capsys, corpus)


def test_structure_is_checked_completely(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Beyond 65,536 sequences opening a corpus looks at some only, at even places.
    prefix = tmp_path / "a"
    writer = IndexWriter(str(prefix), 2)
    writer.add_documents(np.ones(200_000, np.uint16), np.ones(200_000, np.int64))
    writer.finish()
    index = Path(f"{prefix}.idx")
    content = bytearray(index.read_bytes())
    content[34 + 4 * 100_001 : 34 + 4 * 100_002] = (-1).to_bytes(4, "little", signed=True)
    index.write_bytes(content)
    assert "sequence 100001 has length -1" in problems_of(capsys, str(prefix))[".idx structure"]["found"]


def test_one_damaged_corpus_does_not_hide_another(
    corpus: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = write_with_manifest(tmp_path / "b")
    bad = write_with_manifest(tmp_path / "c")
    flip(Path(f"{bad}.bin"), 3)
    code, reports = verify(capsys, bad, str(tmp_path / "absent"), corpus, good)
    assert code == 1
    assert [report["ok"] for report in reports] == [False, False, True, True]
    assert "no corpus at" in reports[1]["problems"][0]["found"]


def test_pieces_make_no_difference(tmp_path: Path) -> None:
    documents = random_documents(3, 50)
    prefix = write_corpus(tmp_path / "a", documents)
    ids = np.concatenate([np.array(document, np.int64) for document in documents])
    limit = int(ids[:100].max()) + 1  # So that the first one beyond lies in a later piece.
    told: list[int] = []
    with mock.patch.object(corpus_scan, "CHUNK_BYTES", 64):
        scan = corpus_scan.scan_bin(Path(f"{prefix}.bin"), np.dtype(np.uint16), limit, told.append)
    assert sum(told) == scan.file.size == 2 * len(ids)
    assert max(told) == 64
    assert scan.file.xxh3_128 == xxhash.xxh3_128(ids.astype(np.uint16).tobytes()).hexdigest()
    assert (scan.ids.min_id, scan.ids.max_id) == (ids.min(), ids.max())
    assert scan.ids.num_outside == (ids >= limit).sum()
    first = int(np.argmax(ids >= limit))
    assert scan.ids.first_outside == (first, ids[first])


def test_interruption_stops_the_other_files(tmp_path: Path) -> None:
    from megatron_7b.data.upkeep.verify import CorpusCheck, verify_corpora

    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        verify_corpora([CorpusCheck(write_with_manifest(tmp_path / "a"))], num_threads=2, advance=interrupt)


def test_a_bar_on_a_terminal(corpus: str) -> None:
    terminal, stderr = pty.openpty()
    command = [sys.executable, "-m", "megatron_7b", "data", "verify", corpus]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    finished = subprocess.run(
        command, stderr=stderr, stdout=subprocess.PIPE, text=True, check=True, env=environment, timeout=60
    )
    os.close(stderr)
    shown = os.read(terminal, 1 << 16).decode()
    os.close(terminal)
    total = sum(Path(corpus + suffix).stat().st_size for suffix in (".bin", ".idx"))
    assert f"{total}/{total} bytes" in shown
    assert ": good" in finished.stdout
