"""Files of what a teacher finds probable: their room on the disk is taken before anything is computed."""

from pathlib import Path

import pytest

from megatron_7b.data.samples.teacher_logits import CachedLogits
from tests.support.small_disk import small_disk


def test_a_disk_without_room_is_told_at_the_start_and_nothing_is_left(tmp_path: Path) -> None:
    """A mapped file that runs out of room would end the process by a signal."""
    manifest = CachedLogits(
        num_samples=64, top_k=64, temperature=1.0, vocab_size=451, tokenizer=None, teacher="any", dtype="fp16",
        order={"seq_length": 64}, reading={},
    )  # fmt: skip
    files = manifest.open(tmp_path / "cache", "w+")
    assert (files.ids.shape, files.logps.shape) == ((64, 64, 64), (64, 64, 65))
    files.ids[-1] = 7  # it can be written to
    with small_disk(tmp_path / "disk", 1200) as disk:
        with pytest.raises(OSError, match="No space left on device: .*cache.logps"):
            manifest.open(disk / "cache", "w+")
        assert list(disk.iterdir()) == []
