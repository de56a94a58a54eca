"""What resumed runs read after a change of batch sizes, blend or corpora: the rest, or they are refused."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from megatron_7b.checkpoint.manifest import Counters, Manifest, read_manifest, write_manifest
from megatron_7b.cli.commands import data
from megatron_7b.config.schema import RunConfig
from megatron_7b.data import open_split
from megatron_7b.errors import CheckpointError, ConfigError
from megatron_7b.training.prerequisites import check_prerequisites
from megatron_7b.training.progress import read_progress
from tests.support.ranks import run_ranks
from tests.training import runs

SAMPLES = 120
"""Of one epoch: 60 documents of 50 tokens, four fifths of them for training, in samples of 20."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    return runs.write_corpus(tmp_path_factory.mktemp("corpus"))


def config(corpus: str | tuple[str, ...], steps: int, batch: int, **fields: Any) -> RunConfig:
    training = {"train_steps": steps, "micro_batch_size": 2, "global_batch_size": batch, "eval_interval_steps": 0}
    train = (corpus,) if isinstance(corpus, str) else corpus
    section = {"seq_length": 20, "max_epochs": (1.0,), "train": train, **fields}
    run = runs.config(train[-1], data=section, training=training, checkpoint={"save_interval_steps": 0})
    return dataclasses.replace(run, model=dataclasses.replace(run.model, max_position_embeddings=64))


def start(run: RunConfig, run_dir: Path, world_size: int = 1) -> str:
    """Run to the end; returns the error, or nothing."""
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")}
    (code, error), *_ = run_ranks(world_size, runs.pretrain, run, run_dir)
    assert code == (None if error else 0)
    if error:  # Nothing was written.
        assert {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")} == before
    return error


def log(run_dir: Path) -> str:
    return (run_dir / "train.log").read_text()


def test_the_samples_of_a_run_are_those_consumed_and_those_of_the_steps_left(corpus: str, tmp_path: Path) -> None:
    """Other batch sizes, forth and back, to exactly the end of the epoch."""
    run_dir = tmp_path / "run"
    assert start(config(corpus, 10, 8), run_dir) == ""
    error = start(config(corpus, 31, 2), run_dir)
    assert "the run takes 122 samples of 20 tokens, but with data.max_epochs all sets have run out after 120" in error
    assert start(config(corpus, 20, 2), run_dir, 1) == ""  # 80 + 10 * 2
    assert start(config(corpus, 22, 10), run_dir, 1) == ""  # 100 + 2 * 10; all 22 steps of 10 would be too many
    assert "all sets have run out after 120" in start(config(corpus, 23, 2), run_dir)
    steps = runs.steps(run_dir)
    assert [line["consumed_samples"] for line in steps] == [*range(8, 81, 8), *range(82, 101, 2), 110, 120]
    assert steps[-1]["consumed_tokens"] == 120 * 20
    assert "steps 1 to 10, 1.6k tokens" in log(run_dir)
    assert "steps 11 to 20, 400 tokens (2k with those of earlier steps)" in log(run_dir)
    assert "steps 21 to 22, 400 tokens (2.4k with those of earlier steps)" in log(run_dir)
    # Fewer steps than are done: nothing happens, and it says so.
    assert start(config(corpus, 5, 8), run_dir) == ""
    assert "22 steps are done, and training.train_steps is 5" in log(run_dir)
    assert len(runs.steps(run_dir)) == 22


def test_any_chain_of_batch_sizes_and_ranks_learns_from_the_same_samples(corpus: str, tmp_path: Path) -> None:
    """At a learning rate of almost 0 the loss of a sample does not depend on the steps before it."""

    def lifeless(steps: int, batch: int) -> RunConfig:
        run = config(corpus, steps, batch)
        return dataclasses.replace(run, optimizer=dataclasses.replace(run.optimizer, lr=1e-30, min_lr=1e-30))

    assert start(lifeless(60, 2), tmp_path / "one_by_one") == ""
    losses = [line["loss"] for line in runs.steps(tmp_path / "one_by_one")]  # of two samples each
    chain = tmp_path / "chain"
    for steps, batch, world_size in ((2, 12, 2), (5, 4, 1), (6, 24, 2), (8, 8, 2)):
        assert start(lifeless(steps, batch), chain, world_size) == ""
    begin = 0
    for line in runs.steps(chain):
        end = line["consumed_samples"]
        assert line["loss"] == pytest.approx(sum(losses[begin // 2 : end // 2]) / ((end - begin) / 2), rel=1e-5)
        begin = end
    assert begin == 2 * 12 + 3 * 4 + 24 + 2 * 8


def test_what_does_not_continue_is_refused_before_anything_is_written(corpus: str, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    assert start(config(corpus, 4, 8), run_dir) == ""
    longer = config(corpus, 6, 8, seq_length=30)
    for refused, words in (
        (longer, "data.seq_length is 30, the run had 20"),
        (config(corpus, 6, 8, split="50,50"), "documents 0 to 30 of"),
    ):
        error = start(refused, run_dir, 2)
        assert error.startswith("ConfigError")
        assert words in error
        with pytest.raises(ConfigError, match=words):
            check_prerequisites(refused, run_dir)  # what the launcher does before it starts any rank
    with pytest.raises(ConfigError, match="run out after 120"):
        check_prerequisites(config(corpus, 16, 8), run_dir)
    check_prerequisites(config(corpus, 15, 8), run_dir)
    restart = dataclasses.replace(longer, data=dataclasses.replace(longer.data, on_order_change="restart"))
    assert start(restart, run_dir) == ""
    assert "in a new order, from sample 32 on, because data.seq_length is 30" in log(run_dir)
    assert runs.steps(run_dir)[-1]["consumed_tokens"] == 32 * 20 + 16 * 30
    more = dataclasses.replace(restart, training=dataclasses.replace(restart.training, train_steps=8))
    assert start(more, run_dir) == ""
    assert log(run_dir).count("in a new order") == 1
    order = read_manifest(run_dir / "checkpoints" / "step_00000008").sample_order
    assert order is not None
    assert (order["first_sample"], order["seq_length"]) == (32, 30)


def test_a_set_joins_the_blend(corpus: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "other").mkdir()
    other, run_dir = runs.write_corpus(tmp_path / "other", seed=6), tmp_path / "run"
    assert start(config(corpus, 4, 8), run_dir) == ""
    blend = config(("0.5", other, "0.5", corpus), 6, 8)
    assert start(blend, run_dir) == ""
    assert f"from sample 32 on, each set continues where it was; new: {other}" in log(run_dir)
    order = read_manifest(run_dir / "checkpoints" / "step_00000006").sample_order
    assert order is not None
    assert [(one["prefix"], one["number"], one["consumed"]) for one in order["sets"]] == [
        (other, 1, 0),
        (corpus, 0, 32),
    ]
    # The plan of the rest counts from there.
    flags = ["--run-dir", str(run_dir), "--training.train-steps", "10"]
    assert data.main(["plan", *flags, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["steps_done"], plan["consumed_samples"], plan["samples"], plan["notes"]) == (6, 48, 80, [])
    assert [(row["consumed"], row["samples"]) for row in plan["sets"]] == [(0, 24), (32, 56)]
    assert plan["tokens"] == 80 * 20
    assert data.main(["plan", *flags]) == 0
    assert "10 steps, 80 samples of 20, 1,600 tokens; done: 6 steps, 48 samples" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"data\.seq_length is 40, the run had 20"):
        data.main(["plan", *flags, "--data.seq-length", "40"])


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_batch_that_cannot_be_read_ends_the_run_with_the_steps_before_it_saved(tmp_path: Path, ranks: int) -> None:
    broken = runs.write_corpus(tmp_path, bad_id=5000)
    run = config(broken, 15, 8)
    run = dataclasses.replace(run, checkpoint=dataclasses.replace(run.checkpoint, save_optimizer=False))
    dataset = open_split(dataclasses.replace(run.data, tokenizer=None), "train", seed=run.training.seed)
    tokens = dataset.batch(range(SAMPLES))
    first = int(((tokens.tokens == 5000) | (tokens.labels == 5000)).any(axis=1).argmax())
    good_steps = first // 8
    assert good_steps > 0
    (_, error), *_ = run_ranks(ranks, runs.pretrain, run, tmp_path / "run")
    assert "token id 5000 in document 30" in error or "failed in reading the batch" in error
    assert read_manifest(tmp_path / "run" / "checkpoints" / "latest").counters.step == good_steps
    assert runs.status(tmp_path / "run") == {"state": "failed", "exit_code": 1, "step": good_steps}
    # The corpus is repaired, and the run continues.
    runs.write_corpus(tmp_path)
    assert "is not the corpus that was read" in start(run, tmp_path / "run", ranks)
    trusting = dataclasses.replace(run, data=dataclasses.replace(run.data, on_order_change="trust"))
    assert start(trusting, tmp_path / "run", ranks) == ""
    assert len(runs.steps(tmp_path / "run")) == 15


def test_validation_goes_on_without_the_sets_that_are_too_small(corpus: str, tmp_path: Path) -> None:
    (tmp_path / "tiny").mkdir()
    tiny = runs.write_corpus(tmp_path / "tiny", num_documents=2)
    run = config(("0.99", corpus, "0.01", tiny), 2, 8, max_epochs=())
    assert start(run, tmp_path / "run", 2) == ""
    assert len(runs.validations(tmp_path / "run")) == 1
    assert f"validation leaves out 1 of 2 sets, whose share of data.split holds less than one sample: {tiny}" in log(
        tmp_path / "run"
    )
    assert start(dataclasses.replace(run, data=dataclasses.replace(run.data, train=(tiny,))), tmp_path / "two") == ""
    assert "no validation: data.valid is empty, and data.split (80,20,0) leaves no set" in log(tmp_path / "two")


@pytest.mark.parametrize("suffix", [".bin", ".idx", ".json"])
def test_a_corpus_that_is_not_what_its_manifest_says_is_refused(corpus: str, tmp_path: Path, suffix: str) -> None:
    (tmp_path / "corpus").mkdir()
    prefix = runs.write_corpus(tmp_path / "corpus")
    assert data.main(["adopt", prefix, "--tokenizer", "bytes"]) == 0
    run = config(("1", corpus, "1", prefix), 2, 8)
    run = dataclasses.replace(run, model=dataclasses.replace(run.model, vocab_size=300))
    file = Path(prefix + suffix)
    content = bytearray(file.read_bytes())
    # The fifth document begins a sequence earlier, which a valid index might say.
    place = {".bin": 100, ".idx": 34 + 60 * 12 + 5 * 8, ".json": content.find(b"version")}[suffix]
    content[place] ^= 1
    file.write_bytes(content)
    for code, error in run_ranks(2, runs.pretrain, run, tmp_path / "run"):
        assert code is None
        assert error.startswith("DataFormatError: corpora are not what their manifests say")
        assert f"{file}: " in error
    assert not (tmp_path / "run").exists()


SET_ORDER: dict[str, Any] = {
    "prefix": "/c", "number": 0, "weight": 1, "first_document": 0, "end_document": 9, "num_tokens": 999, "content": "",
    "max_samples": None, "consumed": 0,
}  # fmt: skip


def write_progress(checkpoints: Path, run: RunConfig, order: dict[str, Any] | None = None) -> Counters:
    """Write what `read_progress` reads of a checkpoint, and return its counters."""
    folder = checkpoints / "step_00000004"
    folder.mkdir(parents=True)
    counters = Counters(step=4, consumed_samples=32, consumed_tokens=640, optimizer_steps=4)
    manifest = Manifest(
        counters=counters, vocab_size=97, params_dtype="float32", layout="TP1×PP1×DP1", world_size=1,
        has_optimizer=True, sample_order=order,
    )  # fmt: skip
    write_manifest(folder, manifest, run)
    return counters


@pytest.mark.parametrize(
    "fields",
    [
        {"sets": []},
        {"first_sample": 33},
        {"first_sample": 4, "pass_begin": 8},
        {"pass_begin": -1},
        {"sets": [SET_ORDER | {"max_samples": -3}]},
        {"sets": [SET_ORDER | {"max_samples": 31}]},
        {"sets": [SET_ORDER | {"consumed": -1}]},
        {"dropped": [1]},
        {"sets": [SET_ORDER | {"kind": "other"}]},
    ],
)
def test_an_order_in_which_no_run_reads_is_refused(corpus: str, tmp_path: Path, fields: dict[str, Any]) -> None:
    run = config(corpus, 6, 8)
    possible = {"seq_length": 20, "seed": 7, "sets": [SET_ORDER], "first_sample": 0, "pass_begin": 0, "dropped": []}
    for folder, order in ((tmp_path / "possible", possible), (tmp_path / "none", possible | fields)):
        write_progress(folder, run, order)
    assert read_progress(tmp_path / "possible", run).counters.consumed_samples == 32
    with pytest.raises(CheckpointError, match="does not say in which order samples were read"):
        read_progress(tmp_path / "none", run)


def test_a_checkpoint_without_a_record_of_the_order_compares_the_settings(corpus: str, tmp_path: Path) -> None:
    run = config(corpus, 6, 8)
    counters = write_progress(tmp_path / "checkpoints", run)
    progress = read_progress(tmp_path / "checkpoints", run)
    assert (progress.counters, progress.samples_at_end(run), progress.tokens_left(run)) == (counters, 48, 320)
    assert progress.reached is not None
    assert open_split(run.data, "train", seed=7, reached=progress.reached).notes == ()
    other = config(("0.5", corpus, "0.5", corpus), 6, 8, seq_length=30)
    reached = read_progress(tmp_path / "checkpoints", other).reached
    with pytest.raises(ConfigError, match="data.seq_length is 30, the run had 20\n.*the proportion of the sets"):
        open_split(other.data, "train", seed=7, reached=reached)
