"""What a start finds out about its corpora without reading all of them."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import xxhash

from megatron_7b.cli.commands import data
from megatron_7b.data.corpus.fingerprint import NUM_SPOTS, SPOT_BYTES, corpus_spots, spot_hash, spot_offsets
from megatron_7b.data.corpus.manifest_reader import load_manifest
from megatron_7b.data.upkeep import quick_check
from megatron_7b.data.upkeep.quick_check import check_corpora, refuse_damaged
from megatron_7b.errors import DataFormatError
from tests.data.corpora import random_documents, write_corpus


def write_with_manifest(prefix: Path, seed: int, num_documents: int = 40) -> str:
    """A corpus of ids below 256, and what adopting it writes."""
    written = write_corpus(prefix, random_documents(seed, num_documents, vocab_size=256))
    assert data.main(["adopt", written, "--tokenizer", "bytes"]) == 0
    return written


def problem_of(prefix: str, *, full: bool = False) -> str:
    """All that is wrong with one corpus, or nothing."""
    (checked,) = check_corpora([prefix], full=full)
    return "; ".join(checked.problems)


def flip(file: Path, position: int, bit: int = 1) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= bit
    file.write_bytes(content)


@pytest.mark.parametrize("full", [False, True])
def test_every_flipped_bit_of_a_small_corpus_is_found(tmp_path: Path, full: bool) -> None:
    prefix = write_with_manifest(tmp_path / "a", 1)
    assert problem_of(prefix, full=full) == ""
    for suffix, stride in ((".bin", 101), (".idx", 67)):
        file = Path(prefix + suffix)
        for position in range(0, file.stat().st_size, stride):
            flip(file, position)
            assert f"{file}: " in problem_of(prefix, full=full)
            flip(file, position)
    manifest = Path(f"{prefix}.json")
    for word in (b'"bytes:', b'"job_hash"', b'"xxh3_128": "'):
        place = manifest.read_bytes().index(word) + len(word) - 2
        flip(manifest, place)
        assert ".json" in problem_of(prefix, full=full)
        flip(manifest, place)
    assert problem_of(prefix, full=full) == ""


def test_files_of_another_corpus_cut_short_and_missing(tmp_path: Path) -> None:
    prefix, other = (write_with_manifest(tmp_path / name, seed) for name, seed in (("a", 1), ("b", 2)))
    for suffix in (".bin", ".idx", ".json"):
        own, theirs = Path(prefix + suffix), Path(other + suffix)
        kept = own.read_bytes()
        shutil.copy(theirs, own)
        assert problem_of(prefix) != ""
        own.write_bytes(kept[:-2])
        assert problem_of(prefix) != ""
        own.unlink()
        assert (problem_of(prefix) != "") == (suffix != ".json")  # without a manifest nothing can be compared
        own.write_bytes(kept)
    assert problem_of(prefix) == ""


def test_all_damaged_corpora_are_named_at_once(tmp_path: Path) -> None:
    prefixes = [write_with_manifest(tmp_path / name, seed) for seed, name in enumerate("abcd")]
    flip(Path(f"{prefixes[1]}.bin"), 5)
    flip(Path(f"{prefixes[3]}.idx"), 40)
    checked = check_corpora(prefixes, full=False)
    assert [bool(one.problems) for one in checked] == [False, True, False, True]
    assert [one.content for one in checked] == [corpus_spots(prefix).fingerprint for prefix in prefixes]
    with pytest.raises(DataFormatError) as raised:
        refuse_damaged(checked)
    for expected in (f"{prefixes[1]}.bin: xxh3_128", f"{prefixes[3]}.idx: xxh3_128", "data adopt PREFIX"):
        assert expected in str(raised.value)
    refuse_damaged(checked[::2])


def test_of_large_files_evenly_spread_blocks_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a corpus of a megabyte were too large to be hashed whole."""
    prefix = write_with_manifest(tmp_path / "a", 1, 30_000)
    bin_file = Path(f"{prefix}.bin")
    size = bin_file.stat().st_size
    assert size > 2 * NUM_SPOTS * SPOT_BYTES
    monkeypatch.setattr(quick_check, "WHOLE_BYTES", 1000)
    assert problem_of(prefix) == ""
    offsets = spot_offsets(size)
    assert (offsets[0], offsets[-1]) == (0, size - SPOT_BYTES)
    assert np.diff(offsets) == pytest.approx(np.full(NUM_SPOTS - 1, (size - SPOT_BYTES) / (NUM_SPOTS - 1)), abs=1)
    for offset in offsets[::5]:
        flip(bin_file, offset + SPOT_BYTES - 1)
        assert "evenly spread blocks" in problem_of(prefix)
        flip(bin_file, offset + SPOT_BYTES - 1)
    content = bytearray(bin_file.read_bytes())
    content[-size // 20 :] = bytes(size // 20)  # an interrupted copy into a file of the right length
    bin_file.write_bytes(content)
    assert "evenly spread blocks" in problem_of(prefix)
    # Between the blocks only reading everything helps.
    prefix = write_with_manifest(tmp_path / "a2", 1, 30_000)
    flip(Path(f"{prefix}.bin"), offsets[1] - 1)
    assert problem_of(prefix) == ""
    assert "xxh3_128" in problem_of(prefix, full=True)


def test_the_hash_of_the_spots_worked_out_by_hand(tmp_path: Path) -> None:
    file = tmp_path / "file"
    for size in (0, 1, SPOT_BYTES, NUM_SPOTS * SPOT_BYTES, NUM_SPOTS * SPOT_BYTES + 1, 1_000_003):
        content = np.random.default_rng(size).bytes(size)
        file.write_bytes(content)
        blocks = [content[offset : offset + SPOT_BYTES] for offset in spot_offsets(size)]
        expected = xxhash.xxh3_128_hexdigest(size.to_bytes(8, "little") + b"".join(blocks))
        assert spot_hash(file) == expected
        if size <= NUM_SPOTS * SPOT_BYTES:
            assert b"".join(blocks) == content


def test_manifests_of_earlier_versions_have_no_spots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prefix = write_with_manifest(tmp_path / "a", 1)
    manifest = load_manifest(prefix)
    assert manifest is not None
    assert manifest.bin.spots == spot_hash(Path(f"{prefix}.bin"))
    file = Path(f"{prefix}.json")
    file.write_text(file.read_text().replace('"spots"', '"unknown"').replace('"checksum"', '"other"'))
    monkeypatch.setattr(quick_check, "WHOLE_BYTES", 0)
    flip(Path(f"{prefix}.bin"), 5)
    assert problem_of(prefix) == ""
    Path(f"{prefix}.bin").write_bytes(b"\0\0")
    assert "size in bytes" in problem_of(prefix)
