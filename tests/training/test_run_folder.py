"""The run folder: who may use it, and how a resumed run finds its place."""

import dataclasses
import fcntl
import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_7b.config import load_config, save_config
from megatron_7b.config.schema import ModelConfig, RopeScalingConfig, RunConfig
from megatron_7b.errors import ConfigError, TrainingError
from megatron_7b.training.history import record_save
from megatron_7b.training.opening import open_folder
from megatron_7b.training.run_folder import (
    RunFolder,
    check_run_folder,
    keep_metrics_until,
    read_metrics,
    write_status,
)
from tests.support.ranks import run_ranks
from tests.training import runs


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run")


def with_model(**fields: Any) -> RunConfig:
    return RunConfig(model=dataclasses.replace(ModelConfig(), **fields))


def begin(folder: RunFolder, config: RunConfig) -> None:
    """Leave a folder as a start that did one step does."""
    with open_folder(folder, config):
        folder.metrics.write_text('{"step": 1, "loss": 2.0}\n')


def test_a_start_saves_its_effective_configuration(folder: RunFolder) -> None:
    config = with_model(hidden_size=64)
    check_run_folder(folder, config)
    with open_folder(folder, config):
        assert load_config(folder.config) == config


def test_the_same_model_goes_on(folder: RunFolder, caplog: pytest.LogCaptureFixture) -> None:
    begin(folder, with_model(vocab_size=1000))
    config = dataclasses.replace(with_model(), training=dataclasses.replace(RunConfig().training, train_steps=7))
    check_run_folder(folder, config)  # None is whatever the tokenizer says
    with caplog.at_level(logging.INFO), open_folder(folder, config):
        assert "training.train_steps has changed since the last start: 7, was 100" in caplog.text
        assert load_config(folder.config) == config


@pytest.mark.parametrize(
    "fields",
    [
        {"num_layers": 5},
        {"hidden_size": 512},
        {"num_query_groups": 2},
        {"share_embeddings_and_output_weights": True},
        {"rotary_base": 500000.0},
        {"rope_scaling": RopeScalingConfig()},
        {"vocab_size": 1001},
    ],
)
def test_another_model_is_refused(folder: RunFolder, fields: dict[str, Any]) -> None:
    begin(folder, with_model(vocab_size=1000, num_query_groups=4))
    (name,) = fields
    with pytest.raises(ConfigError, match=rf"model\.{name}"):
        check_run_folder(folder, with_model(**fields))


def test_what_changes_no_weight_may_change(folder: RunFolder) -> None:
    begin(folder, with_model())
    check_run_folder(folder, with_model(hidden_dropout=0.1, init_method_std=0.01, transformer_impl="local"))


def test_a_folder_in_which_nothing_happened_takes_any_model(folder: RunFolder) -> None:
    with open_folder(folder, with_model()):
        pass
    check_run_folder(folder, with_model(hidden_size=512))


def test_a_newest_checkpoint_that_has_gone_is_missed(folder: RunFolder, caplog: pytest.LogCaptureFixture) -> None:
    checkpoint = folder.checkpoints / "step_00000004"
    checkpoint.mkdir(parents=True)
    (checkpoint / "checkpoint.json").touch()
    lost = "saved.json says that step 8 was saved, but the newest checkpoint in .* is of step 4"
    for step, is_lost in ((4, False), (8, True)):
        record_save(folder, step)
        caplog.clear()
        with open_folder(folder, RunConfig()) as found:
            assert found.newest == checkpoint
        assert len(re.findall(lost, caplog.text)) == is_lost


def test_a_file_is_no_run_folder(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("something else")
    with pytest.raises(ConfigError, match="is a file"):
        check_run_folder(RunFolder(tmp_path / "run"), RunConfig())


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ConfigError, match="cannot be written to"),
        open_folder(RunFolder(tmp_path / "file/run"), RunConfig()),
    ):
        pass


# A process that trains in a folder until its standard input ends.
HOLDER = """
import sys
from pathlib import Path
from megatron_7b.config.schema import RunConfig
from megatron_7b.training.opening import open_folder
from megatron_7b.training.run_folder import RunFolder
with open_folder(RunFolder(Path(sys.argv[1])), RunConfig()):
    print("holding", flush=True)
    sys.stdin.read()
"""


def hold(folder: RunFolder, job: str | None) -> "subprocess.Popen[str]":
    environment = {**os.environ, **({"SLURM_JOB_ID": job} if job else {})}
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder.root)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "holding\n"
    return process


def test_two_runs_cannot_share_a_folder(folder: RunFolder) -> None:
    process = hold(folder, job=None)
    saved = folder.config.read_text()
    with (
        pytest.raises(TrainingError, match=f"another run is writing to .*: process {process.pid} on "),
        open_folder(folder, with_model(hidden_size=512)),
    ):
        pass
    assert folder.config.read_text() == saved
    process.kill()  # the lock dies with the process, however that ends
    process.communicate()
    with open_folder(folder, RunConfig()):
        pass


def test_a_start_in_a_folder_in_use_writes_nothing(folder: RunFolder, tmp_path: Path) -> None:
    config = runs.config(runs.write_corpus(tmp_path))
    process = hold(folder, job=None)
    before = {path: path.read_bytes() for path in folder.root.rglob("*")}
    ((code, message),) = run_ranks(1, runs.pretrain, config, folder.root)
    assert code is None
    assert f"another run is writing to {folder.root}: process {process.pid} on " in message
    assert {path: path.read_bytes() for path in folder.root.rglob("*")} == before
    process.communicate()


def test_of_starts_at_once_one_gets_the_folder(folder: RunFolder) -> None:
    command = [sys.executable, "-c", HOLDER, str(folder.root)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    processes = [subprocess.Popen(command, text=True, **pipes) for _ in range(4)]
    lines = [process.stdout.readline() for process in processes if process.stdout is not None]
    assert sorted(lines) == ["", "", "", "holding\n"]
    (winner,) = (process for process, line in zip(processes, lines, strict=True) if line)
    for process in processes:
        if process is not winner:
            assert f"another run is writing to {folder.root}: process {winner.pid} on " in process.communicate()[1]
    winner.communicate()
    assert winner.returncode == 0


def test_an_earlier_life_of_the_same_job_is_no_other_run(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    process = hold(folder, job="4711")
    monkeypatch.setenv("SLURM_JOB_ID", "4712")
    with pytest.raises(TrainingError), open_folder(folder, RunConfig()):
        pass
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    with open_folder(folder, RunConfig()):
        assert "still lingers" in caplog.text
    process.communicate()


def test_a_file_system_without_locks_is_used_as_it_is(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with open_folder(folder, RunConfig()):
        assert "does not support file locks (Operation not supported)" in caplog.text


def lines_of(steps: list[int], validated: set[int]) -> list[str]:
    lines = []
    for step in steps:
        lines.append(json.dumps({"step": step, "loss": 1.0 / step}) + "\n")
        if step in validated:
            lines.append(json.dumps({"step": step, "validation_loss": 2.0 / step}) + "\n")
    return lines


@given(
    num_steps=st.integers(0, 30),
    validated=st.sets(st.integers(1, 30)),
    resumed=st.integers(0, 35),
    torn=st.sampled_from(["", '{"step": 31, "lo', '{"step": 3, "loss": 1.0}', "\0\0\0\n", "[1, 2]\n", '{"loss": 1}\n']),
)
def test_metrics_are_cut_behind_the_resumed_step(
    tmp_path_factory: pytest.TempPathFactory, num_steps: int, validated: set[int], resumed: int, torn: str
) -> None:
    folder = RunFolder(tmp_path_factory.mktemp("run"))
    folder.metrics.write_text("".join(lines_of(list(range(1, num_steps + 1)), validated)) + torn)
    validations = keep_metrics_until(folder, resumed)
    kept = range(1, min(num_steps, resumed) + 1)
    assert folder.metrics.read_text() == "".join(lines_of(list(kept), validated))
    assert [line["step"] for line in validations] == sorted(validated & set(kept))
    repeated = lines_of(list(range(resumed + 1, num_steps + 1)), validated)
    aside = folder.repeated_metrics.read_text() if repeated else ""
    assert aside == "".join(repeated)
    assert {path.name for path in folder.root.iterdir()} <= {"metrics.jsonl", folder.repeated_metrics.name}


def test_a_process_that_lingers_cannot_write_into_the_new_metrics(folder: RunFolder) -> None:
    folder.root.mkdir()
    folder.metrics.write_text("".join(lines_of([1, 2, 3], set())))
    with folder.metrics.open("a") as lingering:
        keep_metrics_until(folder, 2)
        lingering.write('{"step": 4, "loss": 9.0}\n')
    assert [values["step"] for _, values in read_metrics(folder.metrics)] == [1, 2]


def test_the_first_start_has_empty_metrics(folder: RunFolder) -> None:
    folder.root.mkdir()
    assert keep_metrics_until(folder, 0) == []
    assert folder.metrics.read_text() == ""


def test_status_is_replaced_whole(folder: RunFolder) -> None:
    folder.root.mkdir()
    write_status(folder, "running", exit_code=None, step=3)
    with folder.status.open() as reader:
        write_status(folder, "saved", exit_code=75, step=9)
        assert json.load(reader) == {"state": "running", "exit_code": None, "step": 3}
    assert json.loads(folder.status.read_text()) == {"state": "saved", "exit_code": 75, "step": 9}
    assert [path.name for path in folder.root.iterdir()] == ["status.json"]


def test_a_saved_configuration_is_read_back_as_it_was(tmp_path: Path) -> None:
    save_config(with_model(vocab_size=1000), tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == with_model(vocab_size=1000)
