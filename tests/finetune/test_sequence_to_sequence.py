"""Targets from sources: the losses of transformers, every layout, sources that are too long, the mistakes."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_7b.config import load_config
from megatron_7b.data.records.corpus import RecordCorpus
from megatron_7b.data.records.source_target import PromptTemplate
from megatron_7b.errors import MegatronError
from megatron_7b.finetune import prepare_finetuning
from megatron_7b.tokenizer import load_tokenizer
from tests.conversion.tiny_models import save_tiny_model, save_tiny_t5, save_tiny_tokenizer
from tests.finetune.test_chat import COMMON, losses
from tests.support.commands import run_command

TASK, TEMPLATE = "sequence_to_sequence", "the {kind}: {source}"
ONE_THREAD = ("--runtime.num-threads", 1)
TP2 = ("--nproc", 2, "--parallel.tensor-model-parallel-size", 2)
LAYOUTS: dict[str, dict[str, tuple[object, ...]]] = {
    "encoder_decoder": {
        "tp2": (*TP2, "--parallel.sequence-parallel", "True"),
        "dp2": ("--nproc", 2, "--parallel.use-distributed-optimizer", "True"),
    },
    "decoder": {"pp3": ("--nproc", 3, "--parallel.pipeline-model-parallel-size", 3)},
}


def records(count: int) -> list[dict[str, str]]:
    """Pairs whose targets follow from their sources."""
    words = ["cat", "mat", "sat", "the", "on", "naïve", "12", "nap"]
    sources = [[words[(number * step) % 8] for step in range(1, 2 + number % 6)] for number in range(count)]
    return [
        {"kind": "end", "source": " ".join(source), "target": " ".join(reversed(source)), "number": str(number)}
        for number, source in enumerate(sources)
    ]


@pytest.fixture(scope="module", params=["encoder_decoder", "decoder"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of each kind with its tokenizer, and a file of pairs."""
    path = tmp_path_factory.mktemp(request.param)
    if request.param == "decoder":
        save_tiny_model("llama_tied", path / "model", vocab_size=300)
    else:
        save_tiny_t5(path / "model", vocab_size=300, decoder_start_token_id=7)
    save_tiny_tokenizer(path / "model")
    (path / "pairs.jsonl").write_text("\ufeff" + "\r\n".join(json.dumps(one) for one in records(24)))
    return path


def finetune(folder: Path, run: Path, start: Path, *more: object) -> None:
    words = ("--checkpoint.initialize-from", start, "--data.train", folder / "pairs.jsonl", "--finetune.task", TASK)
    # Less is blown up of gradients that are almost zero.
    how = ("--finetune.prompt-template", TEMPLATE, "--optimizer.adam-eps", 1e-6, *ONE_THREAD)
    done = run_command("finetune", *COMMON, "--run-dir", run, *words, *how, *more)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    """A run of four steps on one rank, with all that the first start prepares."""
    finetune(folder, folder / "run", folder / "model")
    return folder / "run"


def prepare(folder: Path, run: Path, pairs: Path, **options: Any) -> tuple[RecordCorpus, list[str]]:
    """Prepare a run; return its corpus, and what was said."""
    said: list[str] = []
    config = load_config(
        ["sft_tiny_cpu"],
        {
            "finetune.task": TASK, "finetune.prompt_template": TEMPLATE, "data.train": (str(pairs),),
            "data.seq_length": 64, "checkpoint.initialize_from": str(folder / "model"), **options,
        },
    )  # fmt: skip
    prepared = prepare_finetuning(config, run, lambda label, text: said.append(f"{label} {text}"))
    return RecordCorpus(prepared.data.train[0]), said


def reference_loss(folder: Path) -> float:
    """The mean loss of the targets' tokens, each record by itself, by transformers."""
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    tokenizer = load_tokenizer(folder / "model")
    assert tokenizer.eod_id is not None
    total = count = 0.0
    auto = AutoModelForSeq2SeqLM if folder.name.startswith("encoder") else AutoModelForCausalLM
    model = auto.from_pretrained(folder / "model", dtype=torch.float32).eval()
    for record in records(24):
        prompt, target = tokenizer.encode(f"the end: {record['source']}"), tokenizer.encode(record["target"])
        labels, given = [*target, tokenizer.eod_id], [*prompt, tokenizer.eod_id]
        if auto is AutoModelForCausalLM:
            labels, given = [*[-100] * len(prompt), *labels], [*prompt, *labels]
        loss = model(torch.tensor([given]), labels=torch.tensor([labels])).loss.item()
        total += loss * (len(target) + 1)
        count += len(target) + 1
    return total / count


def test_the_loss_is_that_of_transformers_on_each_record(folder: Path, run: Path):
    done = run_command(
        "evaluate", "--checkpoint", next(run.glob("base-*")), "--data", next(run.glob("data/*.idx")).with_suffix(""),
        "--json", "--objective.name", TASK, "--data.seq-length", 64, *TP2, *ONE_THREAD,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["loss"] == pytest.approx(reference_loss(folder), rel=1e-6)


def test_layouts_and_resumed_runs_agree(folder: Path, run: Path, tmp_path: Path):
    """What decoders learn has the form of conversations, whose layouts are tried elsewhere."""
    base = next(run.glob("base-*"))
    for name, layout in LAYOUTS[folder.name.rstrip("0123456789")].items():
        finetune(folder, tmp_path / name, base, *layout)
        assert losses(tmp_path / name) == pytest.approx(losses(run), abs=1e-5), name
    assert losses(run)[-1] < losses(run)[0]
    for steps in (2, 4) if "encoder" in folder.name else ():
        finetune(folder, tmp_path / "r", base, "--training.train-steps", steps, "--optimizer.lr-decay-steps", 4)
        assert losses(tmp_path / "r") == losses(run)[:steps]


def test_what_was_learned_is_written_and_measured(folder: Path, run: Path, tmp_path: Path):
    """On two ranks with a copy each; a source that is too long is cut as in training."""
    is_decoder = folder.name.startswith("decoder")
    few = [*records(4), *([{"kind": "end", "source": "cat " * 99, "target": "nap"}] if is_decoder else [])]
    file, output = tmp_path / "few.jsonl", tmp_path / "predictions.jsonl"
    file.write_text("\n".join(map(json.dumps, few)))
    learn = (
        *("--data.train", file, "--data.split", 1, "--training.train-steps", 100, "--training.global-batch-size", 4),
        *("--optimizer.lr", 5e-3 if is_decoder else 2e-2, "--finetune.packing", "False"),
        *("--checkpoint.save-interval-steps", 0, "--optimizer.lr-warmup-steps", 5),
    )
    finetune(folder, tmp_path / "run", next(run.glob("base-*")), *learn)
    told = ("--task", TASK) if is_decoder else ()  # it need not be: the checkpoint knows
    done = run_command(
        "evaluate", "--checkpoint", tmp_path / "run", *told, "--data", file, "--output", output, "--json",
        "--keep", "--nproc", 2, "--measures", "bleu", "exact_match", "--max-new-tokens", 20, *ONE_THREAD,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["exact_match"] == 100, output.read_text()
    (kept,) = (tmp_path / "run" / "checkpoints").glob("step_*/evaluations/written-few.jsonl.json")
    assert json.loads(kept.read_text())["results"]["few.jsonl"]["exact_match,none"] == 100
    written = [json.loads(line) for line in output.read_text().splitlines()]
    assert written == [{**record, "prediction": record["target"]} for record in few]
    assert "tok:13a" in done.stdout


def test_what_is_too_long_is_cut_or_left_out_and_said(folder: Path, run: Path, tmp_path: Path):
    long = [{"kind": "end", "source": "nap " * 200, "target": "cat"}, {"kind": "a", "source": "b", "target": "12" * 99}]
    file = tmp_path / "long.jsonl"
    file.write_text("\n".join(map(json.dumps, [*records(8), *long])))
    corpus, said = prepare(folder, tmp_path / "run", file, **{"finetune.max_target_length": 20})
    assert any(line.startswith("cut ") and "1 sources, to fit into data.seq_length = 64" in line for line in said)
    assert any(line.startswith("left out ") and "1 pairs" in line for line in said)
    assert corpus.num_records == 9
    tokenizer, weights = load_tokenizer(folder / "model"), corpus.token_values(8)
    written = corpus.tokens(8)[weights != 0]
    assert np.flatnonzero(weights).tolist() == list(range(len(weights) - len(written), len(weights)))
    assert tokenizer.decode(written[:-1].tolist()) == "cat"
    assert tokenizer.decode(corpus.tokens(8).tolist()).startswith("the end: nap nap")
    assert 60 <= corpus.parts(8)[0] <= 64


MISTAKES = [
    ({"finetune.prompt_template": "no key"}, "it names no key"),
    ({"finetune.prompt_template": "{source} {target}"}, "it shows the target"),
    ({"finetune.prompt_template": "{source"}, "finetune.prompt_template is '{source'"),
    ({"finetune.prompt_template": "{source!r}"}, "only keys may be in braces"),
    ({"finetune.prompt_template": "{question}"}, ":1: it has no 'question', expected a text; its keys are"),
    ({"finetune.target_key": "summary"}, "24 of 24 pairs of source and target cannot be used"),
    ({"finetune.train_on": "last"}, "only applies with finetune.task chat"),
    ({"finetune.max_target_length": 0}, "must be at least 1"),
    ({"data.seq_length": 4}, "none of the 24 pairs of source and target"),
]


@pytest.mark.parametrize(("options", "words"), MISTAKES)
def test_mistakes_are_told_before_anything_is_made(folder: Path, options: dict[str, Any], words: str, tmp_path: Path):
    with pytest.raises(MegatronError, match=re.escape(words)):
        prepare(folder, tmp_path / "run", folder / "pairs.jsonl", **options)
    assert not list(tmp_path.glob("run/*/*"))


def test_braces_are_written_twice():
    assert PromptTemplate("{{{source}}} {source}", "target").fill({"source": "x"}) == "{x} x"
