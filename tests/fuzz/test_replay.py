"""Inputs that fuzzing kept, replayed; and hypothesis looking for more in the time of a test."""

from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.fuzz.fuzz_jsonl import CORPUS, KINDS, check_reading, read

INPUTS = sorted(CORPUS.iterdir())
PIECES = st.sampled_from(
    [b'{"text": "', b'"}', b'{"text":"a"}', b'"b":"', b",", b"\n", b"\r\n", b"\n\n", b" ", b"\\ud83d", b"\\ude00",
     b"\\", b"\xef\xbb\xbf", b"\xc3\xa9", b"\xff", b"\x00", b"NaN", b"1e999", b"[", b"]", b"{", b"null"]
)  # fmt: skip


@pytest.mark.parametrize("path", INPUTS, ids=lambda path: path.name)
def test_kept_inputs(path: Path, tmp_path: Path) -> None:
    check_reading(path.read_bytes(), tmp_path)


@given(kind=st.integers(0, 255), pieces=st.lists(PIECES | st.binary(max_size=4), max_size=12))
@example(kind=0, pieces=[b"\xef\xbb\xbf", b"\n", b'{"text":"a"}'])
def test_any_bytes(tmp_path_factory: pytest.TempPathFactory, kind: int, pieces: list[bytes]) -> None:
    check_reading(bytes([kind]) + b"".join(pieces), tmp_path_factory.getbasetemp())


def test_the_inputs_reach_all_outcomes(tmp_path: Path) -> None:
    """Good and bad records, and files that are refused as a whole."""
    results = []
    for path in INPUTS:
        data = path.read_bytes()
        suffix, text_documents = KINDS[data[0] % len(KINDS)]
        file = tmp_path / f"input{suffix}"
        file.write_bytes(data[1:])
        results.append(read(file, ["text"], text_documents, 1 << 20))
    assert None in results
    assert any(result and result[0][0] for result in results)
    assert any(result and result[2] for result in results)
