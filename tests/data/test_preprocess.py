"""`tools/preprocess_data.py` as a user runs it: formats, exact ids, failures that leave nothing behind."""

import contextlib
import gzip
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers
import xxhash
from backports import zstd

from megatron_7b.cli.main import main
from megatron_7b.data.corpus.fingerprint import spot_hash
from megatron_7b.data.reading.blocks import Block
from megatron_7b.data.reading.sources import Source
from tests.support.assets import asset

REPOSITORY = Path(__file__).resolve().parents[2]
ADVERSARIAL = [
    "", "\x00", "a\x00b", "<|endoftext|>", "x <|endoftext|>y", "\r\n\t ", "".join(map(chr, range(0xD800))),
    "".join(chr(plane << 16 | low) for plane in range(17) for low in (0x41, 0xFF00, 0xFFFD)), " " * 3000, "",
]  # fmt: skip


def run_tool(*arguments: object, expect: int = 0) -> subprocess.CompletedProcess[str]:
    """Run what the tool runs, in this process: an exception that reaches its user would end the test."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(["preprocess", *map(str, arguments)])
    assert code == expect, f"exit code {code}\n{out.getvalue()}\n{err.getvalue()}"
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


def read_corpus(prefix: Path) -> tuple[list[list[int]], list[int]]:
    """Sequences and document bounds, read by hand as the format's definition says."""
    index = Path(f"{prefix}.idx").read_bytes()
    assert index[:9] == b"MMIDIDX\x00\x00"
    assert int.from_bytes(index[9:17], "little") == 1
    dtype = {8: np.dtype(np.uint16), 4: np.dtype(np.int32)}[index[17]]
    num_sequences, num_bounds = np.frombuffer(index, np.int64, 2, 18).tolist()
    lengths = np.frombuffer(index, np.int32, num_sequences, 34)
    pointers = np.frombuffer(index, np.int64, num_sequences, 34 + 4 * num_sequences)
    bounds = np.frombuffer(index, np.int64, num_bounds, 34 + 12 * num_sequences)
    assert len(index) == 34 + 12 * num_sequences + 8 * num_bounds
    ids = np.fromfile(f"{prefix}.bin", dtype)
    starts = pointers // dtype.itemsize
    return [ids[start : start + n].tolist() for start, n in zip(starts, lengths, strict=True)], bounds.tolist()


def read_manifest(prefix: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads(Path(f"{prefix}.json").read_text())
    return manifest


def write_jsonl(file: Path, texts: Sequence[str], key: str = "text") -> Path:
    file.write_bytes(b"".join(orjson.dumps({key: text}) + b"\n" for text in texts))
    return file


def encode(texts: Sequence[str], eod: bool = True) -> list[list[int]]:
    reference = tokenizers.Tokenizer.from_file(str(asset("gpt2") / "tokenizer.json"))
    encoded = reference.encode_batch_fast(list(texts), add_special_tokens=False)
    return [encoding.ids + [50256] * eod for encoding in encoded if encoding.ids]


def list_files(folder: Path) -> list[str]:
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())


@pytest.mark.parametrize("engine", ["auto", "tokenizers"])
def test_sotu_with_gpt2_is_exactly_what_tokenizers_gives(tmp_path: Path, engine: str) -> None:
    texts = [orjson.loads(line)["text"] for line in asset("sotu.jsonl").read_bytes().splitlines()]
    texts = texts[:: 1 if engine == "auto" else 20]
    corpus = write_jsonl(tmp_path / "sotu.jsonl", [*texts, *ADVERSARIAL])
    arguments = ["--input", corpus, "--output-prefix", tmp_path / "out" / "sotu", "--tokenizer-model", asset("gpt2")]
    result = run_tool(*arguments, "--append-eod", "--workers", 2, "--engine", engine)
    prefix = tmp_path / "out" / "sotu_text_document"
    sequences, bounds = read_corpus(prefix)
    assert sequences == encode([*texts, *ADVERSARIAL])
    # The first and the last adversarial text are empty: documents without a sequence.
    full = len(texts) + len(ADVERSARIAL) - 2
    assert bounds == [*range(len(texts) + 1), *range(len(texts), full + 1), full]
    assert "2 empty documents" in result.stdout
    manifest = read_manifest(prefix)
    expected_engine = "fastokens" if engine == "auto" else "tokenizers"
    assert manifest["engine"]["name"].startswith(expected_engine)
    assert manifest["counts"]["documents"] == len(texts) + len(ADVERSARIAL)
    assert manifest["counts"]["tokens"] == sum(map(len, sequences))


def test_stock_megatron_core_reads_it(tmp_path: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    texts = [orjson.loads(line)["text"] for line in asset("sotu.jsonl").read_bytes().splitlines()[:20]]
    corpus = write_jsonl(tmp_path / "c.jsonl", texts)
    run_tool("--input", corpus, "--output-prefix", tmp_path / "c", "--tokenizer-model", asset("gpt2"), "--append-eod")
    dataset = IndexedDataset(str(tmp_path / "c_text_document"))
    assert [dataset[index].tolist() for index in range(len(dataset))] == encode(texts)
    assert dataset.document_indices.tolist() == list(range(21))


def test_every_format_gives_the_same_corpus(tmp_path: Path) -> None:
    texts = [f"document {number}: naïve \U0001f600\n\nline" for number in range(50)]
    plain = write_jsonl(tmp_path / "plain.jsonl", texts)
    raw = plain.read_bytes()
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(raw[:700]) + gzip.compress(raw[700:]))  # several members
    (tmp_path / "a.jsonl.zst").write_bytes(zstd.compress(raw[:700]) + zstd.compress(raw[700:]))
    (tmp_path / "bom.jsonl").write_bytes(b"\xef\xbb\xbf" + raw.replace(b"\n", b"\r\n").rstrip())
    window = {zstd.CompressionParameter.window_log: 31, zstd.CompressionParameter.enable_long_distance_matching: 1}
    long = zstd.ZstdCompressor(options=window)  # without the size in its header, the frame keeps this window
    (tmp_path / "long.JSONL.ZST").write_bytes(long.compress(raw) + long.flush())
    pq.write_table(pa.table({"id": range(50), "text": texts}), tmp_path / "a.parquet", row_group_size=7)
    pq.write_table(pa.table({"text": pa.array([text.encode() for text in texts])}), tmp_path / "BINARY.PARQUET")
    folder, elsewhere = tmp_path / "texts", tmp_path / "texts2"
    for number, text in enumerate(texts):
        file = (folder if number < 40 else elsewhere) / f"{number:03}.txt"
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    # A link is followed, each folder once; what is hidden, or a corpus's manifest, is no text.
    (folder / "linked").symlink_to(elsewhere)
    (folder / "loop").symlink_to(folder)
    for name in ("README.md", ".hidden.jsonl", "c.json", "c.idx"):
        (folder / name).write_text("not a document")
    outputs = []
    files = ["plain.jsonl", "a.jsonl.gz", "a.jsonl.zst", "long.JSONL.ZST", "bom.jsonl", "a.parquet", "BINARY.PARQUET"]
    for name in (*files, "texts", "texts*/*.txt"):
        prefix = tmp_path / f"out{len(outputs)}"
        run_tool("--input", tmp_path / name, "--output-prefix", prefix, "--tokenizer-model", "bytes", "--append-eod")
        manifest = read_manifest(Path(f"{prefix}_text_document"))
        outputs.append([Path(f"{prefix}_text_document{suffix}").read_bytes() for suffix in (".bin", ".idx")])
        assert manifest["counts"]["documents"] == 50
    assert all(output == outputs[0] for output in outputs)
    assert read_corpus(tmp_path / "out0_text_document")[0] == [[*text.encode(), 256] for text in texts]


def test_order_is_the_input_order_whatever_the_workers(tmp_path: Path) -> None:
    """Files larger than a block, documents of very different sizes, several files."""
    texts = [f"{number} " + "word " * (number * 7919 % 8_000) for number in range(120)]
    first, second = write_jsonl(tmp_path / "b.jsonl", texts[:80]), write_jsonl(tmp_path / "a.jsonl", texts[80:])
    assert first.stat().st_size > 1 << 20
    outputs = []
    for workers in (1, 2, 5):
        prefix = tmp_path / f"out{workers}"
        run_tool(
            "--input",
            first,
            second,
            "--output-prefix",
            prefix,
            "--tokenizer-model",
            asset("gpt2"),
            "--workers",
            workers,
        )
        outputs.append([Path(f"{prefix}_text_document{suffix}").read_bytes() for suffix in (".bin", ".idx")])
    assert outputs[0] == outputs[1] == outputs[2]
    assert read_corpus(tmp_path / "out1_text_document")[0] == encode(texts, eod=False)


def test_several_keys_bos_and_int32(tmp_path: Path) -> None:
    corpus = tmp_path / "c.jsonl"
    corpus.write_text('{"title": "a b", "body": "c"}\n{"title": "", "body": "d"}\n{"title": "e"}\n')
    definition = json.loads((asset("gpt2") / "tokenizer.json").read_bytes())
    definition["added_tokens"].append({**definition["added_tokens"][0], "id": 70_000, "content": "<|far|>"})
    folder = tmp_path / "tokenizer"
    shutil.copytree(asset("gpt2"), folder)
    (folder / "tokenizer.json").write_text(json.dumps(definition))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|far|>", "bos_token": "<|endoftext|>"}')
    arguments = ["--input", corpus, "--output-prefix", tmp_path / "o", "--tokenizer-model", folder]
    run_tool(*arguments, "--json-keys", "title", "body", "--append-eod", "--prepend-bos", "--engine", "tokenizers")
    eod = read_manifest(tmp_path / "o_body_document")["tokenizer"]["eod_id"]
    titles, title_bounds = read_corpus(tmp_path / "o_title_document")
    assert titles == [[50256, 64, 275, eod]]
    assert title_bounds == [0, 1, 1]
    assert read_corpus(tmp_path / "o_body_document")[0] == [[50256, 66, eod], [50256, 67, eod]]


def test_manifest(tmp_path: Path) -> None:
    corpus = write_jsonl(tmp_path / "c.jsonl", ["a", "", "bb"])
    run_tool(
        "--input", corpus, "--output-prefix", tmp_path / "o.v1", "--tokenizer-model", asset("gpt2"), "--append-eod"
    )
    prefix = tmp_path / "o.v1_text_document"
    manifest = read_manifest(prefix)
    for name in ("bin", "idx"):
        content = Path(f"{prefix}.{name}").read_bytes()
        expected = {"size": len(content), "xxh3_128": xxhash.xxh3_128_hexdigest(content)}
        assert manifest[name] == {**expected, "spots": spot_hash(Path(f"{prefix}.{name}"))}
    source = {
        "path": str(corpus),
        "size": corpus.stat().st_size,
        "xxh3_128": xxhash.xxh3_128_hexdigest(corpus.read_bytes()),
        "span": None,
    }
    assert manifest["sources"] == [source]
    assert manifest["tokenizer"]["vocab_size"] == 50257
    assert manifest["tokenizer"]["eod_id"] == 50256
    assert manifest["token_bytes"] == 2
    assert manifest["counts"] == {
        "documents": 3, "sequences": 2, "tokens": 4, "empty_documents": 1, "bad_records": 0,
        "min_id": 64, "max_id": 50256,
    }  # fmt: skip


def test_bad_lines_are_counted_and_named(tmp_path: Path) -> None:
    corpus = tmp_path / "c.jsonl"
    bad = b"".join(b"broken %d\n" % number for number in range(30))
    corpus.write_bytes(b'{"text": "good"}\n' + bad + b'{"text": "\\ud800"}\n\n{"text": "fine"}')
    arguments = ["--input", corpus, "--output-prefix", tmp_path / "o", "--tokenizer-model", "bytes"]
    result = run_tool(*arguments)
    assert "31 bad records left out" in result.stdout
    assert f"{corpus}:2: not JSON" in result.stdout
    assert result.stdout.count("not JSON") == 10
    assert read_corpus(tmp_path / "o_text_document")[0] == [list(b"good"), list(b"fine")]
    assert read_manifest(tmp_path / "o_text_document")["counts"]["bad_records"] == 31

    strict = run_tool(*arguments[:3], tmp_path / "s", *arguments[4:], "--strict", expect=1)
    assert f"{corpus}:2: not JSON" in strict.stderr
    assert "Traceback" not in strict.stderr
    assert not [name for name in list_files(tmp_path) if name.startswith("s")]


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.jsonl", b"", "no token"),
        ("a.jsonl", b'{"txet": "a"}\n', "key 'text' is missing"),
        ("a.jsonl", b'{"text": ""}\n', "1 documents, all empty"),
        ("a.jsonl.gz", gzip.compress(os.urandom(100_000))[:50_000], "a.jsonl.gz cannot be read"),
        ("a.jsonl.gz", b"not gzip at all", "a.jsonl.gz cannot be read"),
        ("a.jsonl.zst", zstd.compress(os.urandom(100_000))[:50_000], "a.jsonl.zst"),
        ("a.jsonl.zst", b"not zstd at all", "a.jsonl.zst"),
        ("a.parquet", b"PAR1 not parquet", "a.parquet is not a readable parquet file"),
        ("a.jsonl", gzip.compress(b"{}", mtime=0), "a.jsonl is gzip-compressed, but its name does not end in .gz"),
        ("a.json", b'\xef\xbb\xbf[\n{"text": "a"},\n{"text": "b"}\n]\n', "begins with an array of objects"),
        ("a.json.gz", gzip.compress(b'{\n  "text": "a"\n}\n', mtime=0), "begins with an object on several lines"),
        ("a.txt", "a".encode("utf-16"), "a.txt is UTF-16"),
        ("a.txt", b"\xffa", "`iconv` converts it"),
    ],
)
def test_failures_publish_nothing(tmp_path: Path, name: str, content: bytes, problem: str) -> None:
    good = write_jsonl(tmp_path / "0.jsonl", ["fine"]) if "cannot" in problem or "zst" in name else None
    (tmp_path / name).write_bytes(content)
    inputs = [good, tmp_path / name] if good else [tmp_path / name]
    before = list_files(tmp_path)
    result = run_tool("--input", *inputs, "--output-prefix", tmp_path / "o", "--tokenizer-model", "bytes", expect=1)
    assert problem in result.stderr
    assert "Traceback" not in result.stderr
    assert list_files(tmp_path) == before


def test_parquet_without_the_column_and_with_bad_values(tmp_path: Path) -> None:
    pq.write_table(pa.table({"content": ["a", None, "b"]}), tmp_path / "a.parquet")
    arguments = ["--input", tmp_path / "a.parquet", "--output-prefix", tmp_path / "o", "--tokenizer-model", "bytes"]
    assert "its columns: content" in run_tool(*arguments, expect=1).stderr
    doubled = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    pq.write_table(doubled, tmp_path / "b.parquet")
    several = run_tool("--input", tmp_path / "b.parquet", *arguments[2:], expect=1).stderr
    assert "has several columns text" in several
    result = run_tool(*arguments, "--json-keys", "content")
    assert "a.parquet:2: key 'content' is null" in result.stdout
    assert read_corpus(tmp_path / "o_content_document")[0] == [[97], [98]]


def test_mistakes_are_reported_together_before_any_work(tmp_path: Path) -> None:
    corpus = write_jsonl(tmp_path / "c.jsonl", ["a"])
    arguments = ["--input", corpus, "--output-prefix", tmp_path / "o", "--tokenizer-model"]
    assert "nothing/here does not exist" in run_tool(*arguments, tmp_path / "nothing/here", expect=2).stderr
    os.mkfifo(tmp_path / "pipe")
    inputs = [tmp_path / "x.jsonl", "y*.gz", tmp_path / "pipe", "-", corpus, corpus]
    missing = run_tool("--input", *inputs, *arguments[2:], "bytes", expect=2).stderr
    for problem in (
        "x.jsonl does not exist",
        "y*.gz matches no file",
        "pipe is not a regular file",
        "standard input",
        "c.jsonl is named twice",
    ):
        assert problem in missing

    (tmp_path / "o_text_document.idx").write_bytes(b"precious")
    no_eod = tmp_path / "no_eod"
    shutil.copytree(asset("gpt2"), no_eod)
    (no_eod / "tokenizer_config.json").write_text("{}")
    (no_eod / "special_tokens_map.json").write_text('{"unk_token": "!"}')
    both = run_tool(*arguments, no_eod, "--append-eod", "--json-keys", "text", "a/b", "", expect=2).stderr
    for problem in ("--append-eod", "output exists", "--json-keys 'a/b'", "--json-keys ''"):
        assert problem in both
    assert (tmp_path / "o_text_document.idx").read_bytes() == b"precious"
    run_tool(*arguments, "bytes", "--overwrite")
    assert read_corpus(tmp_path / "o_text_document")[0] == [[97]]


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--partitions", "4", "--keep-sequential-samples", "--tokenizer-hf-no-include-special-tokens"], None),
        (["--vocab-file", "v.json", "--merge-file=m.txt"], "--tokenizer-model bytes and --vocab-file"),
        (["--tokenizer-type", "NullTokenizer"], "'NullTokenizer' is not taken here: text is tokenized here"),
        (["--tokenizer-type", "gpt"], "expected one of auto, hugging_face"),
        (["--dataset-impl", "mmap"], "--dataset-impl is not taken here: mmap is the only format"),
        (["--workres", "2"], "unrecognized arguments: --workres 2"),
        (["--split-sentences", "--lang", "../x"], "--lang is '../x', expected a Punkt model of nltk_data, or one of"),
        (["--split-sentences", "--lang", "zn"], "chinese (zh), czech (cs)"),
        (["--workers", "0"], "'0' is not a positive number"),
        (["--workers", "many"], "'many' is not a positive number"),
        (["--workers", "1000000"], "more than 1024 threads"),
        (["--verify-sample-mb", "nan"], "'nan' is not a number of megabytes"),
    ],
)
def test_options_that_megatrons_users_type(
    tmp_path: Path, flags: list[str], problem: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = write_jsonl(tmp_path / "c.jsonl", ["a"])
    try:
        code = main(["preprocess", "--input", str(corpus), "--output-prefix", str(tmp_path / "o"), "--tokenizer-model",
                     "bytes", *flags])  # fmt: skip
    except SystemExit as leaving:  # argparse's
        code = int(leaving.code or 0)
    assert code == (0 if problem is None else 2)
    assert (problem or "") in capsys.readouterr().err
    assert (tmp_path / "o_text_document.idx").exists() == (problem is None)


def test_a_source_that_changes_while_it_is_read_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = write_jsonl(tmp_path / "c.jsonl", ["a"])
    read_blocks = Source.read_blocks

    def grow(source: Source, *arguments: Any) -> Iterator[Block]:
        yield from read_blocks(source, *arguments)
        write_jsonl(corpus, ["a", "b"])

    command = ["preprocess", "--input", str(corpus), "--output-prefix", str(tmp_path / "o")]
    with mock.patch.object(Source, "read_blocks", grow):
        assert main([*command, "--tokenizer-model", "bytes"]) == 0
    assert f"{corpus} was changed while it was read" in capsys.readouterr().err


def test_a_path_that_is_no_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / os.fsdecode(b"\xff")
    folder.mkdir()
    corpus = str(write_jsonl(folder / "c.jsonl", ["a"]))
    assert (
        main(["preprocess", "--input", corpus, "--output-prefix", str(tmp_path / "o"), "--tokenizer-model", "bytes"])
        == 0
    )
    assert read_manifest(tmp_path / "o_text_document")["sources"][0]["path"] == corpus
    assert main(["data", "verify", str(tmp_path / "o")]) == 0
    # What the machine refuses is one sentence too.
    (tmp_path / "p_text_document.journal").mkdir()
    assert (
        main(["preprocess", "--input", corpus, "--output-prefix", str(tmp_path / "p"), "--tokenizer-model", "bytes"])
        == 1
    )
    assert "p_text_document.journal: Is a directory" in capsys.readouterr().err


def test_split_sentences(tmp_path: Path) -> None:
    texts = ["Mr. Adams spoke. The house listened!  Nobody left?", "", "One sentence"]
    corpus = write_jsonl(tmp_path / "c.jsonl", texts)
    arguments = [
        "--input",
        corpus,
        "--tokenizer-model",
        "bytes",
        "--append-eod",
        "--split-sentences",
        "--output-prefix",
    ]
    for name, environment, origin in (
        ("installed", {"NLTK_DATA": str(asset("nltk_data"))}, "nltk_data's model for english"),
        ("learned", {"NLTK_DATA": str(tmp_path), "HOME": str(tmp_path)}, "learned from the corpus"),
    ):
        # The tool itself, as a user starts it from anywhere; and nltk looks for its data when it is imported.
        command = [sys.executable, REPOSITORY / "tools/preprocess_data.py", *map(str, arguments), tmp_path / name]
        result = subprocess.run(
            command, capture_output=True, text=True, check=True, env={**os.environ, **environment}, cwd="/"
        )
        assert origin in result.stderr
        sequences, bounds = read_corpus(tmp_path / f"{name}_text_sentence")
        if name == "installed":
            sentences = ["Mr. Adams spoke.", "The house listened!", "Nobody left?", "One sentence"]
            expected = [list(sentence.encode()) for sentence in sentences]
            expected[2].append(256)
            expected[3].append(256)
            assert sequences == expected
            assert bounds == [0, 3, 3, 4]
        assert sequences[-1] == [*b"One sentence", 256]


def test_start_up_is_quick_and_without_torch(tmp_path: Path) -> None:
    corpus = write_jsonl(tmp_path / "c.jsonl", ["a b c"])
    arguments = [
        "--input",
        str(corpus),
        "--output-prefix",
        str(tmp_path / "o"),
        "--tokenizer-model",
        str(asset("gpt2")),
    ]
    script = (
        "import sys, time; sys.argv[0] = 'x'; start = time.process_time()\n"
        "from megatron_7b.cli.commands.preprocess import main\n"
        f"assert main({arguments!r}) == 0\n"
        "loaded = {'torch', 'transformers', 'pyarrow', 'awkward', 'nltk', 'rich'} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
        "print(time.process_time() - start)"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    # CPU time, so that a busy machine does not fail it; measured 0.6 s with both engines built.
    assert float(result.stdout.splitlines()[-1]) < 2.0
    tool = [sys.executable, REPOSITORY / "tools" / "preprocess_data.py"]
    shown = subprocess.run([*tool, "--help"], capture_output=True, text=True, check=True, cwd="/")
    assert "usage" in shown.stdout
    arguments[1] = "absent.jsonl"
    failed = subprocess.run([*tool, *arguments], capture_output=True, text=True, check=False, cwd="/")
    assert failed.returncode == 2
    assert "absent.jsonl does not exist" in failed.stderr


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    line = orjson.dumps({"text": "The Union is strong, and its people are one. " * 500}) + b"\n"
    peaks = []
    for size_mb in (8, 96):
        corpus = tmp_path / f"{size_mb}.jsonl"
        with corpus.open("wb") as file:
            for _ in range(size_mb * 1_000_000 // len(line)):
                file.write(line)
        arguments = ["--input", str(corpus), "--output-prefix", str(tmp_path / f"o{size_mb}"), "--tokenizer-model"]
        script = (
            "import resource\nfrom megatron_7b.cli.commands.preprocess import main\n"
            f"main({[*arguments, str(asset('gpt2')), '--workers', '2']!r})\n"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
        )
        run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=REPOSITORY)
        peaks.append(int(run.stdout.splitlines()[-1]) / 1024)
    # What is under way at once is about 20 MiB; the difference between the files is 88 MB.
    assert peaks[1] - peaks[0] < 50
