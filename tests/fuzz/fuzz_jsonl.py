"""What must hold of reading any bytes as JSON lines, plain text or a compressed file; and a fuzzer that looks for more.

    python -m tests.fuzz.fuzz_jsonl [seconds] [libFuzzer's options]

needs atheris (`pip install atheris`), which is no dependency of the project. New inputs go to the folder named by
FUZZ_NEW_INPUTS, or are dropped; `tests/fuzz/jsonl_corpus` holds the seeds, what fuzzing has found worth keeping, and
whatever once broke the reader. The tests replay it.
"""

import inspect
import json
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from megatron_7b.data.reading import records, sources
from megatron_7b.data.reading.blocks import TextDocuments
from megatron_7b.data.reading.records import parse_block
from megatron_7b.data.reading.sources import Source
from megatron_7b.errors import DataFormatError

CORPUS = Path(__file__).with_name("jsonl_corpus")
KINDS: tuple[tuple[str, TextDocuments], ...] = (
    (".jsonl", "line"),
    (".jsonl.gz", "line"),
    (".jsonl.zst", "line"),
    (".txt", "line"),
    (".txt", "paragraph"),
    (".txt", "file"),
)
_SURROGATE = re.compile("[\ud800-\udfff]")

type Read = tuple[list[list[str]], list[int], list[str]]


def check_reading(data: bytes, folder: Path) -> None:
    """Read `data[1:]` as the kind of file that the first byte says.

    Raises:
        AssertionError: The result depends on where blocks are cut, a record is lost, or a text is not the one that the
            standard library reads.
    """
    if not data:
        return
    suffix, text_documents = KINDS[data[0] % len(KINDS)]
    keys = ["text", "b"] if data[0] >= 128 and suffix != ".txt" else ["text"]
    path = folder / f"input{suffix}"
    path.write_bytes(data[1:])
    whole = read(path, keys, text_documents, 1 << 20)
    assert read(path, keys, text_documents, 7) == whole, "cutting blocks elsewhere changes what is read"
    if whole is not None and suffix == ".jsonl":
        assert whole == read_plainly(data[1:], keys, path)


def read(path: Path, keys: Sequence[str], text_documents: TextDocuments, block_bytes: int) -> Read | None:
    """Texts per key, their numbers and what is said of bad records; None where the file as a whole is refused."""
    texts: list[list[str]] = [[] for _ in keys]
    numbers: list[int] = []
    bad: list[str] = []
    try:
        for block in Source(path).read_blocks(keys, text_documents, block_bytes):
            parsed = parse_block(block, keys)
            assert {len(of_key) for of_key in parsed.texts} == {len(parsed.numbers)}
            for into, of_key in zip(texts, parsed.texts, strict=True):
                into += of_key
            numbers += parsed.numbers
            bad += map(str, parsed.bad)
    except DataFormatError:
        return None
    for text in (text for of_key in texts for text in of_key):
        text.encode()  # what is kept can be written
    return texts, numbers, bad


def read_plainly(data: bytes, keys: Sequence[str], path: Path) -> Read:
    """The same by the standard library, line by line; reasons are not compared."""
    texts: list[list[str]] = [[] for _ in keys]
    numbers: list[int] = []
    bad: list[str] = []
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line.decode())
            values = [record[key] for key in keys]
            if all(isinstance(value, str) and not _SURROGATE.search(value) for value in values):
                for of_key, value in zip(texts, values, strict=True):
                    of_key.append(value)
                numbers.append(number)
                continue
        except (ValueError, KeyError, TypeError, RecursionError):
            pass
        bad.append(f"{path}:{number}")
    return texts, numbers, _Places(bad)


class _Places(list[str]):
    """Equal to messages that begin with these places."""

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, messages: object) -> bool:
        return isinstance(messages, list) and [":".join(m.split(":")[:2]) for m in messages] == list(self)


def main(argv: list[str]) -> int:
    """Run the fuzzer."""
    try:
        import atheris
    except ImportError:
        print("no atheris: `pip install atheris` first", file=sys.stderr)
        return 1
    seconds = argv[0] if argv else "60"
    for module in (records, sources):
        for function in [*vars(module).values(), sources.Source.read_blocks]:
            if inspect.isfunction(function) and function.__module__ == module.__name__:
                atheris.instrument_func(function)
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        new = os.environ.get("FUZZ_NEW_INPUTS", folder)
        options = [f"-max_total_time={seconds}", "-max_len=512", "-timeout=10", "-print_final_stats=1", *argv[1:]]
        Path(folder, "work").mkdir()
        atheris.Setup([sys.argv[0], *options, new, str(CORPUS)], lambda data: check_reading(data, Path(folder, "work")))
        atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
