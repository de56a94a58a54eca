"""What was computed is somewhere, whichever disk is full."""

import re
import tempfile
from pathlib import Path

import pytest

from megatron_7b.errors import MegatronError
from megatron_7b.runtime.rescue import write_or_rescue
from tests.support.small_disk import small_disk

TEXT = "what took hours\n" * 1000


def test_it_is_written_where_it_was_asked_for(tmp_path: Path) -> None:
    write_or_rescue(tmp_path / "new" / "file.txt", lambda stream: stream.write(TEXT))
    assert (tmp_path / "new" / "file.txt").read_text() == TEXT
    assert [path.name for path in tmp_path.rglob("*")] == ["new", "file.txt"]


def test_a_full_disk_is_told_with_the_place_where_it_is_instead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "room").mkdir()
    with small_disk(tmp_path / "full", 8) as full:
        monkeypatch.setattr(tempfile, "tempdir", str(full))
        monkeypatch.setenv("HOME", str(full))
        monkeypatch.chdir(tmp_path / "room")
        with pytest.raises(MegatronError, match="file.txt cannot be written: No space left on device") as caught:
            write_or_rescue(full / "file.txt", lambda stream: stream.write(TEXT))
        rescued = re.search(r"it is in (\S+) instead", str(caught.value))
        assert rescued is not None
        assert Path(rescued[1]).read_text() == TEXT
        assert Path(rescued[1]).parents[1] == tmp_path / "room"
        assert list(full.iterdir()) == []

        monkeypatch.chdir(full)
        with pytest.raises(MegatronError, match="it was printed instead"):
            write_or_rescue(full / "file.txt", lambda stream: stream.write(TEXT))
        assert capsys.readouterr().out == TEXT
