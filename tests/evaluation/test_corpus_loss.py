"""The loss on a corpus against a page of plain torch, at every layout."""

import dataclasses
import itertools
import math
from pathlib import Path

import pytest
import torch

from megatron_7b.checkpoint.inference_config import inference_config
from megatron_7b.checkpoint.manifest import read_manifest, write_manifest
from megatron_7b.data import IndexedDataset
from megatron_7b.errors import ConfigError
from megatron_7b.evaluation.corpus import open_corpus
from megatron_7b.evaluation.corpus_loss import CorpusLoss
from tests.data.corpora import random_documents, write_corpus
from tests.evaluation.checkpoints import (
    SEQ_LENGTH,
    loss_of,
    random_weights,
    tiny_model,
    write_tiny_checkpoint,
)
from tests.support.ranks import RankFailedError, run_ranks
from tests.support.reference_gpt import reference_logits
from tests.support.tiny_runs import VOCAB_SIZE, tiny_config

LAYOUTS = {
    "TP1": (1, {}),
    "TP1, microbatches of 3": (1, {"training.micro_batch_size": 3}),
    "TP2": (2, {"parallel.tensor_model_parallel_size": 2}),
    "TP2+SP": (2, {"parallel.tensor_model_parallel_size": 2, "parallel.sequence_parallel": True}),
    "PP2": (2, {"parallel.pipeline_model_parallel_size": 2}),
    "PP3, uneven": (3, {"parallel.pipeline_model_parallel_size": 3}),
    "PP2xVPP2": (
        2,
        {"parallel.pipeline_model_parallel_size": 2, "parallel.virtual_pipeline_model_parallel_size": 2},
    ),
    "DP3": (3, {}),
    "TP2xPP2xDP2": (
        8,
        {"parallel.tensor_model_parallel_size": 2, "parallel.pipeline_model_parallel_size": 2},
    ),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    (folder,) = run_ranks(1, write_tiny_checkpoint, tmp_path_factory.mktemp("checkpoints"))
    return folder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Documents of odd lengths whose last window is cut short."""
    documents = random_documents(5, 33, vocab_size=VOCAB_SIZE)
    prefix = write_corpus(tmp_path_factory.mktemp("corpus") / "odd", documents)
    assert (sum(map(len, documents)) - 1) % SEQ_LENGTH
    return prefix


def reference(prefix: str, max_windows: int | None = None, *, apart: bool = False) -> tuple[float, int]:
    """The loop of corpus_loss's docstring; `apart`: with every document's part of a window as a window of its own."""
    dataset = IndexedDataset(prefix)
    documents = [torch.tensor(dataset.document(i).astype("int64")) for i in range(dataset.num_documents)]
    ids = torch.cat(documents)
    starts = set(range(0, len(ids) - 1, SEQ_LENGTH)[:max_windows])
    end = min(len(ids) - 1, SEQ_LENGTH * len(starts))
    if apart:
        starts |= set(itertools.accumulate(map(len, documents)))
    weights, model, total = random_weights(tiny_model()), tiny_model(), 0.0
    for start, stop in itertools.pairwise(sorted(start for start in starts | {end} if start <= end)):
        logits = reference_logits(weights, model, ids[None, start:stop])[0, :, :VOCAB_SIZE]
        labels = ids[start + 1 : stop + 1]
        total += float(torch.nn.functional.cross_entropy(logits.double(), labels, reduction="sum"))
    return total / end, end


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_gives_the_reference_loss(name: str, checkpoint: Path, corpus: str) -> None:
    expected, count = reference(corpus)
    assert count == IndexedDataset(corpus).num_tokens - 1
    world_size, overrides = LAYOUTS[name]
    results = run_ranks(world_size, loss_of, checkpoint, corpus, overrides)
    assert len({result[0] for result in results}) == 1  # the same bits on all ranks
    for loss, tokens, reports in results:
        assert tokens == count
        assert loss == pytest.approx(expected, rel=1e-6)
        assert reports[-1] == math.ceil(count / SEQ_LENGTH)


@pytest.mark.parametrize("name", LAYOUTS)
def test_documents_that_training_keeps_apart_are_apart(name: str, checkpoint: Path, corpus: str) -> None:
    (expected, count), (together, _) = reference(corpus, apart=True), reference(corpus)
    assert abs(expected - together) > 1e-4
    world_size, overrides = LAYOUTS[name]
    overrides = {"data.reset_attention_mask": True, "data.reset_position_ids": True, **overrides}
    for loss, tokens, _ in run_ranks(world_size, loss_of, checkpoint, corpus, overrides):
        assert tokens == count
        assert loss == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("max_samples", [1, 5])
def test_only_the_first_windows(max_samples: int, checkpoint: Path, corpus: str) -> None:
    expected, count = reference(corpus, max_samples)
    for world_size, overrides in (LAYOUTS["TP1"], LAYOUTS["PP2"]):
        for loss, tokens, _ in run_ranks(world_size, loss_of, checkpoint, corpus, overrides, max_samples):
            assert tokens == count == max_samples * SEQ_LENGTH
            assert loss == pytest.approx(expected, rel=1e-6)


def test_more_windows_than_there_are(checkpoint: Path, corpus: str) -> None:
    ((loss, tokens, _),) = run_ranks(1, loss_of, checkpoint, corpus, {}, 10_000)
    expected, count = reference(corpus)
    assert (loss, tokens) == (pytest.approx(expected, rel=1e-6), count)


def test_the_same_bits_every_time(checkpoint: Path, corpus: str) -> None:
    world_size, overrides = LAYOUTS["TP2"]
    first, second = (run_ranks(world_size, loss_of, checkpoint, corpus, overrides, 7) for _ in range(2))
    assert first == second


def test_a_corpus_of_two_tokens(checkpoint: Path, tmp_path: Path) -> None:
    prefix = write_corpus(tmp_path / "two", [[5, 400]])
    expected, count = reference(prefix)
    for loss, tokens, _ in run_ranks(2, loss_of, checkpoint, prefix, {}):
        assert (loss, tokens) == (pytest.approx(expected, rel=1e-6), count) == (loss, 1)


def test_foreign_tokens_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    prefix = write_corpus(tmp_path / "foreign", [[1, 2, VOCAB_SIZE]])
    with pytest.raises(RankFailedError, match="DataFormatError"):
        run_ranks(1, loss_of, checkpoint, prefix, {})


def test_masking_ends_needs_to_know_them(checkpoint: Path, corpus: str) -> None:
    config = inference_config(checkpoint, {"data.eod_mask_loss": True})
    with pytest.raises(ConfigError, match="carries no tokenizer with an end-of-document token"):
        open_corpus(corpus, checkpoint, config)


def test_context_parallelism_is_forgotten_and_refused(tmp_path: Path) -> None:
    """A run that used it is evaluated without; asking for it is a mistake: evaluation does not split sequences."""
    trained = tiny_config(model={"transformer_impl": "auto"}, parallel={"context_parallel_size": 2})
    (folder,) = run_ranks(1, write_tiny_checkpoint, tmp_path)
    model = dataclasses.replace(tiny_model(), vocab_size=VOCAB_SIZE)
    write_manifest(folder, read_manifest(folder), dataclasses.replace(trained, model=model))
    assert inference_config(folder).parallel.context_parallel_size == 1
    with pytest.raises(ConfigError, match="only training splits sequences over ranks"):
        inference_config(folder, {"parallel.context_parallel_size": 2})


def test_perplexity() -> None:
    assert CorpusLoss(2.0, 1).perplexity == pytest.approx(math.e**2)
    assert CorpusLoss(1e4, 1).perplexity == math.inf
    assert math.isnan(CorpusLoss(math.nan, 1).perplexity)
