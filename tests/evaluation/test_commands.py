"""`megatron-7b evaluate` and `generate` as a user runs them, on a checkpoint that no one trained."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from megatron_7b.checkpoint import Companions
from megatron_7b.cli.main import main
from megatron_7b.model import fitting
from megatron_7b.model.sizes import count_parameters
from megatron_7b.tokenizer import load_tokenizer
from tests.data.corpora import write_corpus
from tests.evaluation.checkpoints import random_weights, tiny_model
from tests.support.commands import run_command, run_on_ranks
from tests.support.ranks import run_ranks
from tests.support.reference_gpt import reference_loss
from tests.support.tiny_runs import VOCAB_SIZE, tiny_config

TP2 = ["--parallel.tensor-model-parallel-size", "2"]
CP2 = ["--parallel.context-parallel-size", "2"]
PP2 = ["--parallel.pipeline-model-parallel-size", "2"]  # the number of ranks follows


def write_checkpoint(folder: Path) -> Path:
    """Entry point of a rank: random weights with the byte tokenizer."""
    from megatron_7b.checkpoint.weights import write_weights

    load_tokenizer("bytes").save(folder / "tokenizer")
    config = tiny_config(data={"seq_length": 16})
    config = dataclasses.replace(config, model=tiny_model())
    companions = Companions(tokenizer=folder / "tokenizer")
    return write_weights(
        folder / "R" / "checkpoints", random_weights(tiny_model()).items(), config, companions=companions
    )


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    (folder / "tokenizer").mkdir()
    run_ranks(1, write_checkpoint, folder)
    return folder / "R"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    ids = load_tokenizer("bytes").encode("Fellow citizens, ")
    return write_corpus(tmp_path_factory.mktemp("corpus") / "speech", [ids[:9], ids[9:17]])


def test_evaluate_prints_the_loss_last(run_folder: Path, corpus: str) -> None:
    result = run_command("evaluate", "--checkpoint", run_folder, "--data", corpus, "--json", *PP2)
    assert result.returncode == 0, result.stderr
    figures = json.loads(result.stdout.splitlines()[-1])
    assert list(figures) == ["loss", "perplexity", "tokens"]
    ids = torch.tensor([load_tokenizer("bytes").encode("Fellow citizens, ")])
    expected = float(reference_loss(random_weights(tiny_model()), tiny_model(), ids[:, :-1], ids[:, 1:]))
    assert figures["tokens"] == 16
    assert figures["loss"] == pytest.approx(expected, rel=1e-6)
    assert figures["perplexity"] == pytest.approx(torch.tensor(expected).exp().item(), rel=1e-5)


def test_several_checkpoints_and_corpora_share_a_table(run_folder: Path, corpus: str, tmp_path: Path) -> None:
    """Each row is what the command says of its checkpoint and corpus alone, also where ranks meet several times."""
    other, second = tmp_path / "other", write_corpus(tmp_path / "second", [list(b"My fellow Americans")])
    shutil.copytree(run_folder, other)
    single = [
        run_command("evaluate", "--checkpoint", run_folder, "--data", one, "--json").stdout.splitlines()[-1]
        for one in (corpus, second)
    ]
    table = run_command(
        "evaluate", "--checkpoint", run_folder, other, "--data", corpus, second, "--json", *PP2, "--data.seq-length", 16
    )  # fmt: skip
    assert table.returncode == 0, table.stderr
    *lines, last = table.stdout.splitlines()
    rows = json.loads(last)["results"]
    assert [(row["checkpoint"], row["data"]) for row in rows] == [
        (str(checkpoint), data) for checkpoint in (run_folder, other) for data in (corpus, second)
    ]
    for row, alone in zip(rows, [json.loads(one) for one in single] * 2, strict=True):
        assert row["tokens"] == alone["tokens"]
        assert row["loss"] == pytest.approx(alone["loss"], rel=1e-6)
        assert row["perplexity"] == pytest.approx(alone["perplexity"], rel=1e-6)
    assert lines[0].split() == ["checkpoint", "corpus", "tokens", "loss", "perplexity"]
    assert len(lines) == 5
    assert f"{rows[1]['loss']:.6f}" in lines[2]


def test_what_was_measured_is_printed_when_a_later_checkpoint_fails(
    run_folder: Path, corpus: str, tmp_path: Path
) -> None:
    shutil.copytree(run_folder, tmp_path / "torn")
    weights = next((tmp_path / "torn" / "checkpoints").glob("step_*/*.distcp"))
    weights.write_bytes(weights.read_bytes()[:-9] + b"corrupted")
    done = run_command("evaluate", "--checkpoint", run_folder, tmp_path / "torn", "--data", corpus)
    assert done.returncode == 1
    assert str(tmp_path / "torn") in done.stderr
    assert [str(run_folder) in line for line in done.stdout.splitlines()] == [False, True]


def test_generate_gives_the_same_text_at_any_layout(run_folder: Path) -> None:
    """The second time under another launcher than ours, whose first rank alone prints."""
    flags = ["--prompt", "Fellow", "--prompt", "é, ", "--num-samples", 2, "--max-new-tokens", 9, "--top-k", 40]
    arguments = ["generate", "--checkpoint", run_folder / "checkpoints" / "latest", *flags, "--json"]
    one, first, second = run_command(*arguments), *run_on_ranks(2, *arguments, *TP2)
    for result in (one, first, second):
        assert result.returncode == 0, result.stderr
    assert second.stdout == ""
    answers = [json.loads(result.stdout.splitlines()[-1]) for result in (one, first)]
    samples = answers[0]["samples"]
    assert [sample["prompt"] for sample in samples] == ["Fellow", "Fellow", "é, ", "é, "]
    assert all(answer["samples"] == samples for answer in answers)
    assert samples[0]["token_ids"] != samples[1]["token_ids"]
    assert answers[0]["new_tokens"] == sum(len(sample["token_ids"]) for sample in samples)
    assert re.search(r"\d+ tokens in .* s, the first after .* tokens/s", one.stderr)


def test_generate_prints_prompt_and_continuation(run_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("Mr. Speaker", encoding="utf-8")
    flags = ["--checkpoint", run_folder, "--prompt-file", tmp_path / "prompt.txt", "--greedy"]
    one, two = run_command("generate", *flags), run_command("generate", *flags, "--num-samples", 2)
    assert one.returncode == two.returncode == 0, one.stderr
    assert one.stdout.startswith("Mr. Speaker")
    assert one.stdout.endswith("\n")
    assert two.stdout == f"--- text 1 of 2\n{one.stdout}--- text 2 of 2\n{one.stdout}"


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["evaluate", "--checkpoint", "R", "--data", "C", "--nproc", 3, *PP2], 2, "3 ranks cannot hold"),
        (["evaluate", "--checkpoint", "R", "--data", "C", "--max-samples", 0], 2, "--max-samples is 0"),
        (["evaluate", "--checkpoint", "R", "--data", "C.absent"], 2, "no corpus"),
        (["evaluate", "--checkpoint", "R.absent", "--data", "C"], 2, "does not exist"),
        (["evaluate", "--checkpoint", "R", "--data", "C", "--data.seq-lenght", 9], 2, "data.seq_length"),
        (["evaluate", "--checkpoint", "R", "--data", "C", "--model.vocab-size", 9], 2, "model.vocab_size is 9, but"),
        (["evaluate", "--checkpoint", "R", "--data", "C", *CP2], 2, "parallel.context_parallel_size is 2, but only"),
        (["evaluate", "--checkpoint", "R", "--data", "C", *CP2, "--nproc", 4], 2, "any layout can be loaded at any"),
        (["evaluate", "--checkpoint", "R", "R", "--data", "C"], 2, "twice"),
        (["evaluate", "--checkpoint", "R", "R.absent", "--data", "C"], 2, "does not exist"),
        (["evaluate", "--checkpoint", "R", "--data", "C", "C.absent"], 2, "no corpus"),
        (["evaluate", "--checkpoint", "R", "R.absent", "--tasks", "arc_easy"], 2, "megatron-7b compare"),
        (["generate", "--checkpoint", "R", "--prompt", "x", *CP2], 2, "parallel.context_parallel_size is 2, but only"),
        (["generate", "--checkpoint", "R", "--prompt", "x", "--nproc", 2], 2, "--nproc 1"),
        (["generate", "--checkpoint", "R"], 2, "nothing to continue"),
        (["generate", "--checkpoint", "R", "--prompt", "x", "--max-new-tokens", 99999], 2, "the model's context is"),
        (["generate", "--checkpoint", "R", "--prompt", "x", "--top-p", 0, "--top-k", 0], 2, "top_k is 0"),
        (["generate", "--checkpoint", "R", "--prompt-file", "C.absent"], 2, "cannot be read"),
    ],
    ids=lambda value: None if isinstance(value, int) else " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_mistakes_are_told_before_a_model_is_built(
    arguments: list[object],
    code: int,
    words: str,
    run_folder: Path,
    corpus: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    paths = {"R": run_folder, "C": corpus, "R.absent": f"{run_folder}.absent", "C.absent": f"{corpus}.absent"}
    assert main([str(paths.get(str(argument), argument)) for argument in arguments]) == code
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("error:")
    assert words in output.err


@pytest.mark.parametrize(
    "arguments",
    [
        ["evaluate", "--checkpoint", "R", "--data", "C"],
        ["generate", "--checkpoint", "R", "--prompt", "x"],
        ["generate", "--checkpoint", "R", "--prompt", "x", *TP2],
        ["convert", "to-hf", "--checkpoint", "R/checkpoints/latest", "--output", "O"],
    ],
    ids=" ".join,
)
def test_a_model_that_cannot_fit_is_refused(
    arguments: list[str],
    run_folder: Path,
    corpus: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Four bytes for each of its parameters, one more than there is room for."""
    monkeypatch.setattr(fitting, "may_have_gpu", lambda: False)
    monkeypatch.setattr(fitting, "available_memory", lambda: 4 * count_parameters(tiny_model()) - 1)
    paths = {"R": str(run_folder), "C": corpus, "O": str(tmp_path / "hf")}
    paths["R/checkpoints/latest"] = f"{run_folder}/checkpoints/latest"
    assert main([paths.get(argument, argument) for argument in arguments]) == 2
    assert "the model cannot fit into memory" in capsys.readouterr().err
    assert not (tmp_path / "hf").exists()


def test_a_corpus_of_another_tokenizer_is_refused(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prefix = write_corpus(tmp_path / "other", [[1, 2, 3]])
    tokenizer = {
        "identity": "hugging_face:0",
        "kind": "hugging_face",
        "path": None,
        "vocab_size": VOCAB_SIZE,
        "eod_id": 0,
        "bos_id": None,
        "pad_id": None,
    }
    Path(f"{prefix}.json").write_text(json.dumps({"tokenizer": tokenizer}), encoding="utf-8")
    assert main(["evaluate", "--checkpoint", str(run_folder), "--data", prefix]) == 2
    assert "was written with tokenizer hugging_face:0" in capsys.readouterr().err


def test_a_corpus_that_is_not_what_its_manifest_says_is_refused(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prefix = write_corpus(tmp_path / "speech", [list(range(20)), list(range(30))])
    assert main(["data", "adopt", prefix, "--tokenizer", "bytes"]) == 0
    ids = Path(f"{prefix}.bin")
    ids.write_bytes(ids.read_bytes()[::-1])
    assert main(["evaluate", "--checkpoint", str(run_folder), "--data", prefix]) == 1
    assert f"{prefix}.bin: xxh3_128: expected" in capsys.readouterr().err
