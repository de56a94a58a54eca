"""Conversions that a server keeps: made once, anew when their source has changed, whole or not at all."""

import os
import threading
from pathlib import Path

import pytest

from megatron_7b.errors import ConfigError
from megatron_7b.serving.converted import converted


class Converter:
    """Writes what the source holds, and counts how often."""

    def __init__(self, source: Path) -> None:
        self.source, self.count = source, 0

    def __call__(self, output: Path) -> None:
        self.count += 1
        output.mkdir()
        (output / "weights").write_text((self.source / "model.safetensors").read_text())


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_text("first")
    return folder


def test_a_conversion_is_made_once_and_anew_for_another_source(source: Path, tmp_path: Path):
    convert, folder = Converter(source), tmp_path / "kept"
    weights = source / "model.safetensors"
    checkpoint = converted(source, folder, convert)
    assert (checkpoint / "weights").read_text() == "first"
    assert converted(source, folder, convert) == checkpoint
    assert convert.count == 1
    os.utime(weights, ns=(1, 1))  # touched, with the content that it had
    converted(source, folder, convert)
    assert convert.count == 1
    weights.write_text("other")  # of the same size
    assert (converted(source, folder, convert) / "weights").read_text() == "other"
    (source / "tokenizer.json").write_text("{}")
    converted(source, folder, convert)
    assert convert.count == 3
    (next(folder.iterdir()) / "source.json").write_text("{damaged")
    converted(source, folder, convert)
    assert convert.count == 4
    assert len(list(folder.iterdir())) == 1, "nothing is left of stale ones"


def test_what_fails_is_not_kept(source: Path, tmp_path: Path):
    folder = tmp_path / "kept"

    def fail(output: Path) -> None:
        output.mkdir()
        raise SystemExit(2)

    def change(output: Path) -> None:
        Converter(source)(output)
        (source / "config.json").write_text('{"changed": 1}')

    with pytest.raises(SystemExit):
        converted(source, folder, fail)
    with pytest.raises(ConfigError, match="has changed while it was converted"):
        converted(source, folder, change)
    assert list(folder.iterdir()) == []
    with pytest.raises(ConfigError, match="is no folder"):
        converted(tmp_path / "nothing", folder, fail)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="--converted DIR names another"):
        converted(source, tmp_path / "file" / "kept", fail)


def test_what_a_killed_server_left_is_removed(source: Path, tmp_path: Path):
    folder = tmp_path / "kept"

    def killed(_output: Path) -> None:
        os._exit(1)

    child = os.fork()
    if child == 0:
        converted(source, folder, killed)
    os.waitpid(child, 0)
    assert len(list(folder.iterdir())) == 1
    checkpoint = converted(source, folder, Converter(source))
    assert list(folder.iterdir()) == [checkpoint.parent]


def test_servers_that_start_at_once_share_one(source: Path, tmp_path: Path):
    folder, both, found = tmp_path / "kept", threading.Barrier(2), []

    def convert(output: Path) -> None:
        both.wait(20)
        Converter(source)(output)

    threads = [threading.Thread(target=lambda: found.append(converted(source, folder, convert))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0] == found[1]
    assert (found[0] / "weights").read_text() == "first"
    assert len(list(folder.iterdir())) == 1
