"""`megatron-7b data plan`: compared with counting the samples one by one."""

import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_7b.cli.commands import data
from megatron_7b.config import load_config
from megatron_7b.data import open_split
from megatron_7b.data.corpus.manifest import describe_tokenizer
from megatron_7b.errors import ConfigError, DataFormatError
from megatron_7b.tokenizer import load_tokenizer
from megatron_7b.training.batch_schedule import global_batch_size
from tests.data.corpora import random_documents, write_corpus

SIZES = {"data.seq_length": "16", "training.micro_batch_size": "1", "training.global_batch_size": "6"}


@pytest.fixture
def blend(tmp_path: Path) -> list[str]:
    corpora = [
        write_corpus(tmp_path / f"set{one}", random_documents(one, count)) for one, count in enumerate((60, 300))
    ]
    third = write_corpus(tmp_path / "set2", random_documents(2, 20))
    return ["0.5", corpora[0], "0.3", corpora[1], "0.2", third]


def plan(capsys: pytest.CaptureFixture[str], blend: list[str], overrides: dict[str, Any]) -> dict[str, Any]:
    flags = [word for path, value in overrides.items() for word in (f"--{path}", *str(value).split())]
    assert data.main(["plan", "--config", "tiny_cpu", "--data.train", *blend, *flags, "--json"]) == 0
    shown: dict[str, Any] = json.loads(capsys.readouterr().out)
    return shown


@pytest.mark.parametrize("rampup", [None, ("2", "1", "100"), ("2", "2", "61"), ("3", "3", "100000")])
@pytest.mark.parametrize("steps", [1, 37, 200])
def test_it_is_what_counting_gives(
    blend: list[str], capsys: pytest.CaptureFixture[str], rampup: tuple[str, ...] | None, steps: int
) -> None:
    overrides: dict[str, Any] = {**SIZES, "training.train_steps": steps}
    if rampup:
        overrides["training.rampup_batch_size"] = " ".join(rampup)
    shown = plan(capsys, blend, overrides)

    given = {"data.train": blend, **overrides} | ({"training.rampup_batch_size": list(rampup)} if rampup else {})
    config = load_config("tiny_cpu", given)
    consumed, step_of = 0, [0]  # Of every sample the step that takes it, from 1.
    for step in range(1, steps + 1):
        size = global_batch_size(consumed, config.training)
        step_of += [step] * size
        consumed += size
    dataset = open_split(config.data, "train", seed=config.training.seed)
    sets, samples = dataset.locate(range(consumed))
    assert shown["samples"] == consumed
    assert shown["tokens"] == consumed * 16
    for number, (row, part) in enumerate(zip(shown["sets"], dataset.parts, strict=True)):
        assert (row["prefix"], row["tokens"], row["share"]) == (part.prefix, part.num_tokens, part.share)
        assert row["samples"] == np.count_nonzero(sets == number)
        assert row["epochs"] == pytest.approx(row["samples"] * 16 / part.num_tokens)
        last = np.flatnonzero((sets == number) & (samples == part.num_samples - 1))
        assert row["first_epoch_ends"] == (int(last[0]) + 1 if len(last) else None)
        assert row["first_epoch_ends_at_step"] == (step_of[int(last[0]) + 1] if len(last) else None)


@pytest.mark.parametrize("bounds", ["1 0 3", "2 1.5 0", "0 0 0.5"])
def test_sets_that_run_out(blend: list[str], capsys: pytest.CaptureFixture[str], bounds: str) -> None:
    shown = plan(capsys, blend, {**SIZES, "training.train_steps": 150, "data.max_epochs": bounds})
    given = {"data.train": blend, **SIZES, "data.max_epochs": bounds.split()}
    dataset = open_split(load_config("tiny_cpu", given).data, "train", seed=1234)
    sets, samples = dataset.locate(range(150 * 6))
    ended = 0
    for number, (row, part) in enumerate(zip(shown["sets"], dataset.parts, strict=True)):
        assert row["samples"] == np.count_nonzero(sets == number)
        assert row["max_samples"] == part.max_samples
        last = np.flatnonzero((sets == number) & (samples + 1 == part.max_samples))
        assert row["runs_out"] == (int(last[0]) + 1 if len(last) else None)
        assert row["runs_out_at_step"] == (int(last[0]) // 6 + 1 if len(last) else None)
        ended += len(last)
    assert ended > 0


def test_a_run_beyond_the_end_of_its_data(blend: list[str]) -> None:
    sizes = [word for path, value in SIZES.items() for word in (f"--{path}", value)]
    with pytest.raises(ConfigError, match="all sets have run out after"):
        data.main(["plan", "--data.train", *blend, *sizes, "--data.max-epochs", "1", "--training.train-steps", "9999"])


def test_one_corpus(blend: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    shown = plan(capsys, [blend[1]], {**SIZES, "training.train_steps": 1000})
    (row,) = shown["sets"]
    assert (row["share"], row["samples"], row["first_epoch_ends"]) == (1.0, 6000, row["samples_per_epoch"])
    assert row["first_epoch_ends_at_step"] == -(-row["samples_per_epoch"] // 6)


def test_an_epoch_may_end_with_the_run(blend: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    single = {**SIZES, "training.global_batch_size": 1}
    epoch = plan(capsys, [blend[1]], {**single, "training.train_steps": 1})["sets"][0]["samples_per_epoch"]
    for steps, end in ((epoch - 1, None), (epoch, epoch)):
        (row,) = plan(capsys, [blend[1]], {**single, "training.train_steps": steps})["sets"]
        assert row["first_epoch_ends_at_step"] == end


def test_far_away_epochs_take_no_time(blend: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    shown = plan(capsys, blend, {**SIZES, "training.train_steps": 10**9})
    assert [row["samples"] for row in shown["sets"]] == [3 * 10**9, 18 * 10**8, 12 * 10**8]
    assert all(row["first_epoch_ends_at_step"] < 1000 for row in shown["sets"])


def test_table(blend: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    flags = [word for path, value in SIZES.items() for word in (f"--{path}", value)]
    assert data.main(["plan", "--data.train", *blend, *flags, "--training.train-steps", "60"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "60 steps, 360 samples of 16, 5,760 tokens"
    assert [blend[index] in line for index, line in zip((1, 3, 5), lines[2:5], strict=True)] == [True] * 3
    assert "50.0000%" in lines[2]
    assert "at step" in lines[2]
    assert "not in this run" in lines[3]


def test_table_of_sets_that_run_out(blend: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    flags = [word for path, value in SIZES.items() for word in (f"--{path}", value)]
    bounds = ["--data.max-epochs", "0.5", "0", "99"]
    assert data.main(["plan", "--data.train", *blend, *flags, *bounds, "--training.train-steps", "60"]) == 0
    _, titles, *rows, _ = capsys.readouterr().out.splitlines()
    assert titles.endswith("runs out")
    assert rows[0].rsplit("  ", 1)[1].startswith("at step ")
    assert [row.rsplit("  ", 1)[1].strip() for row in rows[1:]] == ["never", "not in this run"]


def test_validation_and_the_sets_that_are_too_small_for_it(
    blend: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = write_corpus(tmp_path / "tiny", random_documents(3, 8))
    shown = plan(capsys, ["0.9", blend[3], "0.1", tiny], SIZES)["validation"]
    assert [row["prefix"] for row in shown["sets"]] == [blend[3]]
    assert shown["left_out"] == [tiny]
    assert plan(capsys, [tiny], SIZES)["validation"] is None
    flags = [word for path, value in SIZES.items() for word in (f"--{path}", value)]
    assert data.main(["plan", "--data.train", "0.9", blend[3], "0.1", tiny, *flags]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"validation: 1 of 2 sets, {shown['sets'][0]['tokens']:,} tokens; too small for one sample: {tiny}"
    assert data.main(["plan", "--data.train", tiny, *flags]) == 0
    assert "no validation: no set has enough documents for one sample" in capsys.readouterr().out


def test_the_loss_mask_needs_no_tokenizer(blend: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(capsys, blend, {**SIZES, "data.eod_mask_loss": "true"})["samples"] > 0


def test_mistakes(blend: list[str], tmp_path: Path) -> None:
    sizes = [word for path, value in SIZES.items() for word in (f"--{path}", value)]
    with pytest.raises(ConfigError, match="train"):
        data.main(["plan", *sizes])
    with pytest.raises(ConfigError, match=r"data\.seq_lenght"):
        data.main(["plan", "--data.train", *blend, "--data.seq-lenght", "3"])
    with pytest.raises(ConfigError, match="6"):
        data.main(["plan", "--data.train", *blend, *sizes, "--nproc", "4"])
    with pytest.raises(ConfigError, match="--nproc 0"):
        data.main(["plan", "--data.train", *blend, *sizes, "--nproc", "0"])
    with pytest.raises(ConfigError, match="absent"):
        data.main(["plan", "--data.train", str(tmp_path / "absent"), *sizes])
    short = write_corpus(tmp_path / "short", [[1, 2, 3]])
    with pytest.raises(DataFormatError, match="fewer than the 17 of one sample"):
        data.main(["plan", "--data.train", short, *sizes])


def test_one_tokenizer_wrote_all_sets(blend: list[str], tmp_path: Path) -> None:
    for prefix, vocab_size in ((blend[1], 300), (blend[3], 400)):
        facts = replace(describe_tokenizer(load_tokenizer("bytes")), identity=f"bytes:{vocab_size}")
        Path(f"{prefix}.json").write_text(json.dumps({"tokenizer": asdict(facts)}))
    with pytest.raises(ConfigError, match="written with different tokenizers: bytes:300 and bytes:400"):
        data.main(["plan", "--config", "tiny_cpu", "--data.train", *blend])


def test_it_needs_no_torch(blend: list[str]) -> None:
    flags = [word for path, value in SIZES.items() for word in (f"--{path}", value)]
    program = "import sys; from megatron_7b.cli.commands import data; data.main(sys.argv[1:])"
    script = f"{program}; assert 'torch' not in sys.modules"
    command = [sys.executable, "-c", script, "plan", "--data.train", *blend, *flags]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout.count("\n") == 6
