"""T5 from the command line: trained, evaluated, resumed, planned; and what is refused before any rank starts."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_7b.cli.commands import data
from megatron_7b.config import load_config
from megatron_7b.config.schema import RunConfig
from megatron_7b.data.samples.span_corruption import plan_lengths
from megatron_7b.errors import ConfigError
from megatron_7b.generation.prompts import encode_source
from megatron_7b.objective import build_objective
from megatron_7b.objective.span import build_corruption, find_sentinels
from megatron_7b.tokenizer import load_tokenizer
from megatron_7b.training.prerequisites import check_prerequisites
from tests.support.checkpoint_runs import saved_tensors
from tests.support.commands import run_command
from tests.support.ranks import run_ranks
from tests.training import runs

TP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
NUM_SENTINELS = 4
LAYOUTS: tuple[tuple[object, ...], ...] = (
    (),
    ("--nproc", 2, "--training.micro-batch-size", 7),
    ("--nproc", 2, "--parallel.tensor-model-parallel-size", 2),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus, and a tokenizer of as many tokens as it has; sentinels are in T5's order, the first one last."""
    folder = tmp_path_factory.mktemp("span")
    runs.write_corpus(folder)
    sentinels = [f"<extra_id_{number}>" for number in reversed(range(NUM_SENTINELS))]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = [f"w{number}" for number in range(runs.VOCAB_SIZE - len(special) - NUM_SENTINELS)]
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "vocab.txt").write_text("\n".join([*special, *words, *sentinels]))
    return folder


def config(folder: Path, **sections: dict[str, Any]) -> RunConfig:
    run = runs.config(str(folder / "corpus_text_document"), **sections)
    data_section = dataclasses.replace(run.data, tokenizer=str(folder / "tokenizer"))
    model = dataclasses.replace(
        run.model, architecture="t5", num_decoder_layers=1, vocab_size=None, hidden_dropout=0.1, attention_dropout=0.1
    )
    return dataclasses.replace(run, model=model, data=data_section)


@pytest.fixture(scope="module")
def finished(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps on two tensor-parallel ranks without a break."""
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    run = config(folder, parallel=TP2, telemetry={"tensorboard": True})
    assert run_ranks(2, runs.pretrain, run, run_dir) == [(0, ""), (0, "")]
    return run_dir


def test_a_run_learns_and_reports(finished: Path) -> None:
    steps = runs.steps(finished)
    assert steps[-1]["loss"] < 0.95 * steps[0]["loss"]
    assert [line["consumed_tokens"] for line in steps] == [8 * runs.SEQ_LENGTH * step for step in range(1, 7)]
    assert len(runs.validations(finished)) == 2


def test_it_resumes_bit_for_bit(folder: Path, finished: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    decay = {"lr_decay_steps": 6}
    half = config(folder, parallel=TP2, training={"train_steps": 3}, optimizer=decay)
    for run in (half, config(folder, parallel=TP2, optimizer=decay)):
        assert run_ranks(2, runs.pretrain, run, run_dir) == [(0, ""), (0, "")]
    assert [line["loss"] for line in runs.steps(run_dir)] == [line["loss"] for line in runs.steps(finished)]
    found, expected = (saved_tensors(one / "checkpoints" / "latest") for one in (run_dir, finished))
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


def test_evaluation_counts_the_same_tokens_at_every_layout(folder: Path, finished: Path) -> None:
    prefix = str(folder / "corpus_text_document")
    results = []
    for layout in LAYOUTS:
        done = run_command("evaluate", "--checkpoint", finished, "--data", prefix, "--json", *layout)
        assert done.returncode == 0, done.stderr
        results.append(json.loads(done.stdout.splitlines()[-1]))
    run = load_config(finished / "config.yaml")
    samples = build_objective(run).open_corpus(prefix, run, load_tokenizer(folder / "tokenizer"))
    predicted = samples.batch(range(samples.num_samples)).loss_mask.sum()
    assert {result["tokens"] for result in results} == {predicted}
    assert [result["loss"] for result in results] == pytest.approx([results[0]["loss"]] * len(LAYOUTS), rel=1e-5)


def test_it_writes_what_its_export_writes_in_transformers(folder: Path, finished: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForSeq2SeqLM

    prompts = ["w3 w5 <extra_id_0> w7", "w2 <extra_id_0>", "w1 " * 12]
    assert run_command("convert", "to-hf", "--checkpoint", finished, "--output", tmp_path / "hf").returncode == 0
    theirs = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    beams = {"num_beams": 3, "num_return_sequences": 2}
    for layout, flags, fields in (
        ((), ("--greedy",), {}),
        (LAYOUTS[2], ("--num-beams", 3, "--num-return-sequences", 2), beams),
    ):
        asked = [word for prompt in prompts for word in ("--prompt", prompt)]
        done = run_command(
            "generate", "--checkpoint", finished, *asked, "--max-new-tokens", 9, "--json", *flags, *layout
        )
        assert done.returncode == 0, done.stderr
        samples = json.loads(done.stdout.splitlines()[-1])["samples"]
        expected = []
        for prompt in prompts:
            ids = torch.tensor([encode_source(prompt, load_tokenizer(folder / "tokenizer")).ids])
            expected += theirs.generate(ids, max_new_tokens=9, do_sample=False, **fields)[:, 1:].tolist()
        assert [one["token_ids"] for one in samples] == [
            row[: len(one["token_ids"])] for row, one in zip(expected, samples, strict=True)
        ]


def test_sentinels_count_from_the_name(folder: Path) -> None:
    tokenizer = load_tokenizer(folder / "tokenizer")
    last = runs.VOCAB_SIZE - 1
    assert find_sentinels(tokenizer) == tuple(last - number for number in range(NUM_SENTINELS))
    run = dataclasses.replace(config(folder), model=dataclasses.replace(config(folder).model, vocab_size=last + 1))
    corruption = build_corruption(run, tokenizer)
    assert (corruption.start_id, corruption.eos_id) == (0, 3)  # BERT's ends texts with [SEP]


def test_missing_tokens_are_refused_before_ranks_start(folder: Path, tmp_path: Path) -> None:
    run = config(folder, parallel=TP2)
    bytes_alone = dataclasses.replace(run, data=dataclasses.replace(run.data, tokenizer="bytes"))
    with pytest.raises(ConfigError, match="that the tokenizer lacks: .*<extra_id_0>") as refused:
        check_prerequisites(bytes_alone, tmp_path / "run")
    assert "'<pad>' $(seq -f '<extra_id_%g>' 0 99)`" in str(refused.value)
    unknown = dataclasses.replace(run, data=dataclasses.replace(run.data, tokenizer=None))
    with pytest.raises(ConfigError, match="the tokenizer of the corpora is not known"):
        check_prerequisites(unknown, tmp_path / "run")
    many = dataclasses.replace(
        run, objective=dataclasses.replace(run.objective, mean_span_length=1.0, noise_density=0.4)
    )
    with pytest.raises(ConfigError, match=r"data.seq_length = 16 lack 6 spans .* has 4 sentinels"):
        check_prerequisites(many, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_its_plan_counts_the_text_before_it_has_gaps(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--data.train", str(folder / "corpus_text_document"), "--data.seq-length", "16", "--data.split", "80,20,0"]
    assert data.main(["plan", "--config", "t5_tiny_cpu", *flags, "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["sets"]
    raw = next(raw for raw in range(30, 1, -1) if plan_lengths(raw, load_config("t5_tiny_cpu").objective).encoder <= 16)
    assert row["epochs"] == pytest.approx(row["samples"] * raw / row["tokens"])
