"""`megatron-7b data merge`: what one run would have written, or nothing."""

import json
import os
import signal
import tempfile
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_7b.cli.commands import data, data_corpora, preprocess
from megatron_7b.data import IndexWriter
from megatron_7b.data.corpus import scan as corpus_scan
from megatron_7b.data.upkeep import merge
from megatron_7b.data.upkeep.adopt import adopt_corpus
from megatron_7b.errors import ConfigError, DataFormatError
from megatron_7b.tokenizer import load_tokenizer
from tests.data.corpora import write_corpus
from tests.support.assets import asset

type Document = list[list[int]]
"""Its sequences."""

CORPUS = (".bin", ".idx")


def adopt(prefix: str, tokenizer: str | Path = "bytes") -> str:
    adopt_corpus(prefix, load_tokenizer(tokenizer), advance=lambda _: None, overwrite=True)
    return prefix


def write_sentences(prefix: Path, documents: Sequence[Document], token_bytes: int) -> str:
    writer = IndexWriter(str(prefix), token_bytes)
    for document in documents:
        ids = np.array([one for sequence in document for one in sequence], np.int64)
        writer.add_document(ids, np.array([len(sequence) for sequence in document], np.int32))
    writer.finish()
    return adopt(str(prefix))


def write_parts(folder: Path, count: int = 3) -> list[str]:
    return [adopt(write_corpus(folder / f"part{one}", [[one, 1], [], [2, one]])) for one in range(count)]


def files_of(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


SEQUENCES = st.lists(st.lists(st.integers(0, 255), min_size=1, max_size=5), max_size=4)


@given(parts=st.lists(st.lists(SEQUENCES, max_size=6), min_size=1, max_size=4), token_bytes=st.sampled_from([2, 4]))
@settings(max_examples=30, deadline=None)
def test_merged_parts_are_one_run(parts: list[list[Document]], token_bytes: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prefixes = [write_sentences(folder / f"p{one}", part, token_bytes) for one, part in enumerate(parts)]
        whole = write_sentences(folder / "whole", [document for part in parts for document in part], token_bytes)
        with mock.patch.object(merge, "_ENTRIES_AT_ONCE", 3), mock.patch.object(corpus_scan, "CHUNK_BYTES", 6):
            assert data.main(["merge", *prefixes, "--output", str(folder / "merged")]) == 0
        for suffix in CORPUS:
            assert (folder / f"merged{suffix}").read_bytes() == Path(whole + suffix).read_bytes()
        merged, expected = (json.loads((folder / f"{name}.json").read_text()) for name in ("merged", "whole"))
        for name in ("tokenizer", "counts", "token_bytes", "bin", "idx"):
            assert merged[name] == expected[name], name
        assert data.main(["verify", str(folder / "merged")]) == 0


def test_shards_of_real_text(tmp_path: Path) -> None:
    lines = asset("sotu.jsonl").read_bytes().splitlines(keepends=True)[:6]
    lines.insert(2, b'{"text": ""}\n')
    shards = {"whole": lines, "s0": lines[:3], "s1": lines[3:]}
    for name, content in shards.items():
        (tmp_path / f"{name}.jsonl").write_bytes(b"".join(content))
        flags = ["--output-prefix", str(tmp_path / name), "--tokenizer-model", "bytes", "--append-eod"]
        preprocess.main(["--input", str(tmp_path / f"{name}.jsonl"), *flags])
    output = tmp_path / "new" / "merged"
    assert data.main(["merge", str(tmp_path / "s0"), str(tmp_path / "s1"), "--output", str(output)]) == 0
    whole = tmp_path / "whole_text_document"
    for suffix in CORPUS:
        assert Path(f"{output}{suffix}").read_bytes() == Path(f"{whole}{suffix}").read_bytes()
    merged, expected = (json.loads(Path(f"{prefix}.json").read_text()) for prefix in (output, whole))
    for name in ("tokenizer", "counts", "token_bytes", "bin", "idx"):
        assert merged[name] == expected[name], name
    assert [Path(source["path"]).name for source in merged["sources"]] == ["s0.jsonl", "s1.jsonl"]
    origins = merged["options"].pop("merged_from")
    assert merged["options"] == expected["options"]
    assert [(Path(one["prefix"]).name, one["documents"]) for one in origins] == [
        ("s0_text_document", 3),
        ("s1_text_document", 4),
    ]


def test_parts_that_do_not_belong_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second, third = write_parts(tmp_path)
    wide = adopt(write_corpus(tmp_path / "wide", [[1]], token_bytes=4))
    other = adopt(write_corpus(tmp_path / "other", [[1]]), asset("gpt2"))
    alone = write_corpus(tmp_path / "alone", [[1]])
    before = files_of(tmp_path)
    output = str(tmp_path / "out")
    for parts, message in (
        ([first, wide], r"uint16 \(2 bytes\).*int32 \(4 bytes\)"),
        ([first, other], "different tokenizers: identity .* and "),
        ([first, second, first], "given twice"),
    ):
        with pytest.raises(ConfigError, match=message):
            data.main(["merge", *parts, "--output", output])
    with pytest.raises(DataFormatError, match="data adopt"):
        data.main(["merge", first, alone, "--output", output])
    with pytest.raises(ConfigError, match=r"the output exists: .*part2\.bin"):
        data.main(["merge", first, second, "--output", third])
    assert files_of(tmp_path) == before
    for prefix, appended in ((first, True), (second, False)):
        file = Path(f"{prefix}.json")
        file.write_text(json.dumps(json.loads(file.read_text()) | {"options": {"append_eod": appended}}))
    assert data.main(["merge", first, second, "--output", output]) == 0
    assert "different values of append_eod: False, True" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", CORPUS)
def test_a_damaged_part_leaves_nothing(tmp_path: Path, suffix: str) -> None:
    parts = write_parts(tmp_path)
    file = Path(parts[1] + suffix)
    content = bytearray(file.read_bytes())
    # In the index, the last document's beginning: its structure stays possible.
    position = 0 if suffix == ".bin" else len(content) - 16
    content[position] ^= 1
    file.write_bytes(content)
    before = files_of(tmp_path)
    with pytest.raises(DataFormatError, match="is not what its manifest says"):
        data.main(["merge", *parts, "--output", str(tmp_path / "out")])
    assert files_of(tmp_path) == before


def test_interrupted_at_any_moment_it_leaves_nothing(tmp_path: Path) -> None:
    parts = write_parts(tmp_path)
    before = files_of(tmp_path)
    calls: list[int] = []
    for moment in range(1, 7):  # Three .bin and three .idx.

        def interrupt(num_bytes: int, moment: int = moment) -> None:
            calls.append(num_bytes)
            if len(calls) == moment:
                raise KeyboardInterrupt

        calls.clear()
        with pytest.raises(KeyboardInterrupt):
            merge.Merge(parts, str(tmp_path / "out")).run(advance=interrupt)
        assert files_of(tmp_path) == before
    replace, renamed = os.replace, []
    for moment in range(1, 4):  # .bin, .json and .idx get their names.

        def interrupt_rename(source: object, target: object, moment: int = moment) -> None:
            replace(source, target)  # type: ignore[arg-type]
            renamed.append(target)
            if len(renamed) == moment:
                raise KeyboardInterrupt

        renamed.clear()
        with mock.patch.object(os, "replace", interrupt_rename), pytest.raises(KeyboardInterrupt):
            merge.Merge(parts, str(tmp_path / "out")).run(advance=lambda _: None)
        assert files_of(tmp_path) == before
    assert [Path(str(target)).suffix for target in renamed] == [".bin", ".json", ".idx"]


def test_a_terminated_merge_leaves_nothing(tmp_path: Path) -> None:
    parts = write_parts(tmp_path)
    before = files_of(tmp_path)
    with pytest.raises(SystemExit) as stopped, data_corpora._terminated_by_exception():
        merge.Merge(parts, str(tmp_path / "out")).run(advance=lambda _: os.kill(os.getpid(), signal.SIGTERM))
    assert stopped.value.code == 143
    assert files_of(tmp_path) == before


def test_memory_does_not_grow_with_the_corpus(tmp_path: Path) -> None:
    prefix = tmp_path / "a"
    writer = IndexWriter(str(prefix), 2)
    for _ in range(4):
        writer.add_documents(np.ones(1 << 23, np.uint16), np.full(1 << 20, 8, np.int64))
    writer.finish()
    adopt(str(prefix))
    merging = merge.Merge([str(prefix)], str(tmp_path / "out"))
    assert merging.num_bytes > 140e6
    tracemalloc.start()
    merging.run(advance=lambda _: None)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20e6


def test_remains_of_a_killed_merge_are_in_nobodys_way(tmp_path: Path) -> None:
    parts = write_parts(tmp_path)
    for suffix in (".bin.tmp", ".idx.tmp", ".json.tmp"):
        (tmp_path / f"out{suffix}").write_bytes(bytes(1000))
    assert data.main(["merge", *parts, "--output", str(tmp_path / "out")]) == 0
    assert data.main(["verify", str(tmp_path / "out")]) == 0
    assert not list(tmp_path.glob("*.tmp"))
