"""Paths that are wrong: every command answers at once, with exit code 2 and the path, and writes nothing."""

import json
import shlex
import sys
from pathlib import Path

import pytest

from megatron_7b.checkpoint.manifest import MANIFEST
from megatron_7b.cli.main import main

PRETRAIN = "pretrain --config tiny_cpu --nproc 2"
MISSING = [
    "preprocess --input absent --output-prefix new --tokenizer-model bytes",
    "preprocess --input c.jsonl --output-prefix new --tokenizer-model absent",
    "tokenizer train --input absent --vocab-size 300 --output new",
    "tokenizer info absent",
    "tokenizer fertility absent --input c.jsonl",
    "tokenizer fertility bytes --input absent",
    "data prepare --input absent --output-dir new",
    "data prepare --input c.jsonl --output-dir new --config absent",
    "data show absent",
    "data verify absent",
    "data adopt absent --tokenizer bytes",
    "data adopt c_text_document --tokenizer absent --overwrite",
    "data merge absent --output new",
    "data plan --config tiny_cpu --data.train absent",
    "config show absent",
    "config show absent.yaml",
    f"{PRETRAIN} --run-dir new --data.train absent",
    f"{PRETRAIN} --run-dir new --data.train c_text_document --data.tokenizer absent",
    f"{PRETRAIN} --run-dir new --data.train c_text_document --checkpoint.initialize-from absent",
    "pretrain --config absent --run-dir new --data.train c_text_document",
    "evaluate --checkpoint absent --data c_text_document",
    "generate --checkpoint absent --prompt x",
    "generate --checkpoint absent/checkpoints/latest --prompt x",
    "convert to-hf --checkpoint absent --output new",
    "convert from-hf --input absent --output new",
]
A_FOLDER_IS_NEEDED = [
    "tokenizer train --input c.jsonl --vocab-size 300 --output OUT",
    "preprocess --input c.jsonl --output-prefix OUT/x --tokenizer-model bytes",
    "data prepare --input c.jsonl --output-dir OUT",
    "data merge c_text_document --output OUT/x",
    f"{PRETRAIN} --run-dir OUT --data.train c_text_document",
    "convert to-hf --checkpoint step --output OUT",
    "convert from-hf --input hf --output OUT",
]
NO_FOLDER = [
    "evaluate --checkpoint file --data c_text_document",
    "generate --checkpoint file --prompt x",
    "convert to-hf --checkpoint file --output new",
    "convert from-hf --input file --output new",
]
WRONG_FOLDER = [
    "preprocess --input empty --output-prefix new --tokenizer-model bytes",
    "preprocess --input c.jsonl --output-prefix new --tokenizer-model empty",
    "tokenizer train --input empty --vocab-size 300 --output new",
    "tokenizer info empty",
    "data prepare --input empty --output-dir new",
    "data show empty",
    "data verify empty",
    "data merge empty --output new",
    f"{PRETRAIN} --run-dir new --data.train empty",
    "pretrain --config empty --run-dir new --data.train c_text_document",
    "evaluate --checkpoint empty --data c_text_document",
    "convert to-hf --checkpoint empty --output new",
    "convert from-hf --input empty --output new",
]
IN_THE_WAY = [
    "preprocess --input c.jsonl --output-prefix c --tokenizer-model bytes",
    "tokenizer train --input c.jsonl --vocab-size 300 --output tok",
    "data merge c_text_document --output c_text_document",
    "data adopt c_text_document --tokenizer bytes",
    "convert to-hf --checkpoint step --output hf",
    "convert from-hf --input hf --output step",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a corpus, and with what is just enough of a checkpoint, a model and a tokenizer."""
    folder = tmp_path_factory.mktemp("paths")
    lines = [json.dumps({"text": f"Line {number} of a small corpus. " * 20}) for number in range(50)]
    (folder / "c.jsonl").write_text("\n".join(lines))
    flags = ["--output-prefix", folder / "c", "--tokenizer-model", "bytes", "--append-eod"]
    assert main(["preprocess", "--input", *map(str, (folder / "c.jsonl", *flags))]) == 0
    (folder / "file").write_text("a file\n")
    (folder / "empty").mkdir()
    for name, file in (("step", MANIFEST), ("hf", "config.json"), ("tok", "tokenizer.json")):
        (folder / name).mkdir()
        (folder / name / file).write_text("{}")
    return folder


@pytest.mark.parametrize(
    "command",
    [
        *MISSING,
        *(command.replace("OUT", out) for command in A_FOLDER_IS_NEEDED for out in ("file", "file/deeper/still")),
        *NO_FOLDER,
        *WRONG_FOLDER,
        *IN_THE_WAY,
    ],
)
def test_the_answer_comes_without_torch_has_code_2_and_leaves_no_trace(
    folder: Path, command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    for heavy in ("torch", "transformers", "megatron.core"):
        monkeypatch.setitem(sys.modules, heavy, None)  # importing it fails
    before = sorted(folder.rglob("*"))
    assert main(shlex.split(command)) == 2
    said = capsys.readouterr().err
    assert "error: " in said
    assert "Traceback" not in said
    assert sorted(folder.rglob("*")) == before


def test_a_misspelt_corpus_gets_another_one_named_than_was_given(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("web_text_document.bin", "web_text_document.idx", "lonely.idx", "books.bin", "books.idx"):
        (tmp_path / name).touch()

    def asked(name: str) -> str:
        run = ["--run-dir", str(tmp_path / "R"), "--data.train", str(tmp_path / name)]
        assert main(["pretrain", "--config", "tiny_cpu", *run]) == 2
        return capsys.readouterr().err

    assert f"did you mean {tmp_path}/web_text_document?" in asked("web")
    assert f"did you mean {tmp_path}/books?" in asked("boks")
    lonely = asked("lonely")
    assert f"no file {tmp_path}/lonely.bin" in lonely
    assert "did you mean" not in lonely


def test_a_truncated_corpus_is_what_is_reported(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It has no manifest either, which would only be reported later, and as something else."""
    cut = folder / "cut"
    for suffix in (".bin", ".idx"):
        content = Path(f"{folder}/c_text_document{suffix}").read_bytes()
        Path(f"{cut}{suffix}").write_bytes(content[: len(content) // 2] if suffix == ".bin" else content)
    assert main([*shlex.split(PRETRAIN), "--run-dir", str(folder / "new"), "--data.train", str(cut)]) == 1
    assert f"{cut}.bin" in capsys.readouterr().err
    assert not (folder / "new").exists()
    for suffix in (".bin", ".idx"):
        Path(f"{cut}{suffix}").unlink()
