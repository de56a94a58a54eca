"""Embeddings beside sentence-transformers: the same losses and gradients at any layout."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.conversion.tiny_models import save_tiny_model, save_tiny_tokenizer
from tests.finetune.test_chat import COMMON
from tests.support.commands import run_command, run_on_ranks
from tests.support.ranks import run_ranks

STEPS, RECORDS = 3, 8
WORDS = ["the", "cat", "sat", "on", "a", "mat", "at", "12"]
WIDTHS = (16, 48)
TP2 = ("--parallel.tensor-model-parallel-size", 2)


def said(first: int, count: int) -> str:
    return " ".join(WORDS[(first + place) % len(WORDS)] for place in range(count))


def queries(*, with_negatives: bool) -> list[dict[str, Any]]:
    """As many as a step takes, so that their order does not matter."""
    found = []
    for number in range(RECORDS):
        one: dict[str, Any] = {"query": said(number, 2 + number % 2), "positive": said(number, 4 + number % 2)}
        if with_negatives:
            one["negatives"] = [said(3 * number + 1, 3), said(number + 5, 2)]
        found.append(one)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama and a tiny BERT as Hugging Face folders and as checkpoints, and files of queries."""
    path = tmp_path_factory.mktemp("embeddings")
    for name in ("llama", "bert"):
        save_tiny_model(name, path / name, vocab_size=300)
        save_tiny_tokenizer(path / name)
        done = run_command("convert", "from-hf", "--input", path / name, "--output", path / f"{name}_base")
        assert done.returncode == 0, done.stderr
    for name in ("plain", "negatives"):
        lines = map(json.dumps, queries(with_negatives=name == "negatives"))
        (path / f"{name}.jsonl").write_text("\n".join(lines))
    return path


def finetune(folder: Path, run: Path, model: str, pooling: str, data: str, *more: object, ranks: int = 1) -> Any:
    return run_on_ranks(
        ranks, "finetune", *COMMON, "--run-dir", run, "--data.train", folder / f"{data}.jsonl",
        "--checkpoint.initialize-from", folder / f"{model}_base", "--finetune.task", "embedding",
        "--finetune.pooling", pooling, "--data.split", 1, "--data.seq-length", 64, "--finetune.packing", "False",
        "--training.train-steps", STEPS, "--training.global-batch-size", RECORDS,
        "--training.micro-batch-size", RECORDS, "--optimizer.lr", 1e-3, "--optimizer.lr-decay-style", "constant",
        "--optimizer.adam-eps", 1e-6, *more,
    )[0]  # fmt: skip


def figures(run: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "grad_norm" in line]


def sentence_model(folder: Path, pooling: str) -> Any:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    text_model = Transformer(str(folder))
    if text_model.tokenizer.pad_token is None:
        text_model.tokenizer.pad_token = text_model.tokenizer.eos_token
    mode = {"mean": "mean", "cls": "cls", "last": "lasttoken"}[pooling]
    return SentenceTransformer(modules=[text_model, Pooling(48, pooling_mode=mode)], device="cpu")


def train_with_sentence_transformers(folder: Path, pooling: str, data: str, *, nested: bool) -> list[dict[str, float]]:
    """Return loss and gradient norm of each step."""
    from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss, MultipleNegativesRankingLoss

    model = sentence_model(folder, pooling).eval()  # without dropout
    loss: torch.nn.Module = MultipleNegativesRankingLoss(model)
    if nested:
        loss = MatryoshkaLoss(model, loss, matryoshka_dims=list(WIDTHS))
    records = queries(with_negatives=data == "negatives")
    columns = [[one["query"] for one in records], [one["positive"] for one in records]]
    columns += list(map(list, zip(*(one.get("negatives", []) for one in records), strict=True)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), eps=1e-6, weight_decay=0.0)
    found = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        value = loss([model.tokenize(texts) for texts in columns], None)
        value.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        found.append({"loss": value.item(), "grad_norm": norm.item()})
    return found


@pytest.mark.parametrize(
    ("model", "pooling", "data", "layout"),
    [
        ("llama", "last", "negatives", (2, *TP2, "--parallel.sequence-parallel", "True")),
        ("bert", "mean", "negatives", (2, "--parallel.pipeline-model-parallel-size", 2)),
        ("bert", "cls", "plain", (2, *TP2)),
        ("llama", "mean", "plain", (3, "--parallel.pipeline-model-parallel-size", 3)),
    ],
    ids=["tp2_sp", "pp2", "tp2", "pp3"],
)
def test_losses_and_gradients_are_those_of_sentence_transformers(
    folder: Path, model: str, pooling: str, data: str, layout: tuple[Any, ...], tmp_path: Path
):
    nested = pooling == "cls"
    expected = train_with_sentence_transformers(folder / model, pooling, data, nested=nested)
    more = ("--finetune.matryoshka-dims", *WIDTHS) if nested else ()
    done = finetune(folder, tmp_path / "run", model, pooling, data, *layout[1:], *more, ranks=layout[0])
    assert done.returncode == 0, done.stderr
    for name in ("loss", "grad_norm"):
        ours, theirs = ([line[name] for line in lines] for lines in (figures(tmp_path / "run"), expected))
        assert ours[0] == pytest.approx(theirs[0], rel=1e-5, abs=1e-5), name
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5), name  # cosines times 20, after steps of Adam
    assert expected[-1]["loss"] < expected[0]["loss"]


def test_replicas_compare_within_the_same_microbatches(folder: Path, tmp_path: Path):
    words = ("--training.micro-batch-size", 2, "--training.global-batch-size", 4, "--finetune.packing", "True")
    for name, ranks in (("one", 1), ("two", 2)):
        done = finetune(folder, tmp_path / name, "bert", "mean", "plain", *words, ranks=ranks)
        assert done.returncode == 0, done.stderr
    for name in ("loss", "grad_norm", "accuracy"):
        one, two = ([line[name] for line in figures(tmp_path / run)] for run in ("one", "two"))
        assert one == pytest.approx(two, rel=1e-5), name


def vectors_of(run: str, texts: list[str], size: int) -> np.ndarray:
    """Entry point of a rank."""
    from megatron_7b.checkpoint import resolve_checkpoint, tokenizer_path
    from megatron_7b.checkpoint.inference_config import inference_config
    from megatron_7b.checkpoint.open_model import opened_model
    from megatron_7b.evaluation.vectors import embed_texts
    from megatron_7b.tokenizer import load_tokenizer

    checkpoint = resolve_checkpoint(Path(run))
    tokenizer = load_tokenizer(str(tokenizer_path(checkpoint)))
    config = inference_config(checkpoint, {"parallel.tensor_model_parallel_size": size})
    with opened_model(checkpoint, config) as model:
        return embed_texts(model, tokenizer, texts)


@pytest.mark.parametrize(("model", "pooling", "ranks"), [("llama", "last", 2), ("bert", "mean", 1)])
def test_an_export_gives_the_same_vectors_and_finds_the_same(
    folder: Path, model: str, pooling: str, ranks: int, tmp_path: Path
):
    """The vectors of sentence-transformers, and what its own evaluator makes of them."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

    done = finetune(folder, tmp_path / "run", model, pooling, "negatives", "--training.train-steps", 1)
    assert done.returncode == 0, done.stderr
    done = run_command("convert", "to-hf", "--checkpoint", tmp_path / "run", "--output", tmp_path / "hf")
    assert done.returncode == 0, done.stderr
    exported = SentenceTransformer(str(tmp_path / "hf"), device="cpu")
    texts = [said(number, 1 + number % 4) for number in range(11)]
    (ours, *_) = run_ranks(ranks, vectors_of, str(tmp_path / "run"), texts, ranks)
    assert ours == pytest.approx(exported.encode(texts), abs=1e-5)
    tensor_parallel = ("--nproc", ranks, "--parallel.tensor-model-parallel-size", ranks)
    file = ("--data", folder / "negatives.jsonl")
    done = run_command("evaluate", "--checkpoint", tmp_path / "run", *file, "--json", "--keep", *tensor_parallel)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    (kept,) = (tmp_path / "run" / "checkpoints").glob("step_*/evaluations/retrieval-*.json")
    (figures,) = json.loads(kept.read_text())["results"].values()
    assert figures["mrr@10,none"] == found["mrr@10"]
    records = queries(with_negatives=True)
    corpus = dict.fromkeys(text for one in records for text in (one["positive"], *one["negatives"]))
    right: dict[str, set[str]] = {}
    for one in records:
        right.setdefault(one["query"], set()).add(one["positive"])
    evaluator = InformationRetrievalEvaluator(
        {text: text for text in right}, {text: text for text in corpus}, right,
        mrr_at_k=[10], ndcg_at_k=[10], accuracy_at_k=[1], precision_recall_at_k=[1, 5, 10], map_at_k=[10],
    )  # fmt: skip
    expected = evaluator(exported)
    assert (found["queries"], found["documents"]) == (len(right), len(corpus))
    for name in ("recall@1", "recall@5", "recall@10", "ndcg@10", "mrr@10"):
        assert found[name] == pytest.approx(expected[f"cosine_{name}"], abs=1e-6), name


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"query": "x"}, "it has no 'positive'"),
        ({"query": " ", "positive": "y"}, "'query' is empty"),
        ({"query": "x", "positive": "y", "negatives": "z"}, "'negatives' is not a list of texts"),
        ({"query": "x", "positive": "y", "negatives": ["y"]}, "one of the negatives is the positive"),
        ({"query": "x", "positive": "y", "negatives": ["z"]}, "it has 1 negatives, those before it have 0"),
    ],
)
def test_mistakes_are_named_with_their_line(folder: Path, record: Any, words: str, tmp_path: Path):
    file = folder / "bad.jsonl"
    file.write_text("\n".join(map(json.dumps, [{"query": "a", "positive": "b"}, record])))
    done = finetune(folder, tmp_path / "run", "bert", "mean", "bad")
    assert done.returncode == 1
    assert f"{file}:2: " in done.stderr
    assert words in done.stderr
    assert not list(tmp_path.glob("run/data/*"))


def test_widths_beyond_the_model_are_refused(folder: Path, tmp_path: Path):
    done = finetune(folder, tmp_path / "run", "bert", "mean", "plain", "--finetune.matryoshka-dims", 16, 64)
    assert done.returncode == 2
    assert "expected numbers from 1 to 48" in done.stderr
