"""How well queries find the texts that answer them, by the cosines of their vectors.

The documents are all distinct texts of the file, positives and negatives; a query that occurs in several lines has
several right ones. Each query ranks all documents.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_7b.checkpoint import resolve_checkpoint, tokenizer_path
from megatron_7b.checkpoint.inference_config import inference_config
from megatron_7b.config import RunConfig
from megatron_7b.data.embeddings.encoding import Query, read_queries
from megatron_7b.errors import ConfigError
from megatron_7b.tokenizer import load_tokenizer

CUTS = (1, 5, 10)
_DEPTH = CUTS[-1]


@dataclass(frozen=True)
class Retrieval:
    """Means over the queries.

    Attributes:
        queries: Distinct ones.
        documents: Distinct ones.
        recall: Share of the right documents among the first 1, 5 and 10.
        ndcg: Of the first 10, each right document with gain 1.
        mrr: Reciprocal rank of the first right one, 0 beyond the tenth.
    """

    queries: int
    documents: int
    recall: Mapping[int, float]
    ndcg: float
    mrr: float

    def to_dict(self) -> dict[str, float]:
        """Return all figures by name."""
        recalls = {f"recall@{cut}": value for cut, value in self.recall.items()}
        return {
            "queries": self.queries,
            "documents": self.documents,
            **recalls,
            f"ndcg@{_DEPTH}": self.ndcg,
            f"mrr@{_DEPTH}": self.mrr,
        }


def evaluate_retrieval(
    checkpoint: str | Path,
    file: str | Path,
    *,
    overrides: Mapping[str, object] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Retrieval:
    """Measure a checkpoint of an embedding run on a file of queries.

    Args:
        checkpoint: A step folder, `RUN/checkpoints/latest` or a run folder.
        file: JSONL, as the run's `data.train`.
        overrides: Options by dotted path, such as `{"parallel.tensor_model_parallel_size": 2}`.
        on_progress: Takes how many rows are done and how many there are, on the main rank.

    Returns:
        The same on all ranks.

    Collective: all ranks.

    Raises:
        CheckpointError: There is no complete checkpoint, or it is damaged.
        ConfigError: It is not of an embedding run, or carries no tokenizer.
        DataFormatError: Queries cannot be used; all mistakes are named.
    """
    folder = resolve_checkpoint(Path(checkpoint))
    config = inference_config(folder, overrides)
    queries = check_retrieval(folder, config, Path(file))
    return measure_retrieval(folder, config, queries, on_progress=on_progress)


def check_retrieval(folder: Path, config: RunConfig, file: Path) -> list[Query]:
    """Return the queries of a file; refuse a checkpoint that makes no vectors. Collective: none.

    Args:
        folder: The step folder.
        config: From `inference_config`.
        file: JSONL.

    Raises:
        ConfigError: The checkpoint is not of an embedding run, or carries no tokenizer.
        DataFormatError: Queries cannot be used; all mistakes are named.
    """
    if config.objective_name != "embedding":
        raise ConfigError(
            f"{folder} was trained for {config.objective_name}, so its vectors have no meaning",
            hint="--finetune.task embedding trains such a model; --objective.name embedding measures any",
        )
    if tokenizer_path(folder) is None:
        raise ConfigError(f"{folder} carries no tokenizer")
    return list(read_queries(file))


def measure_retrieval(
    folder: Path,
    config: RunConfig,
    queries: Sequence[Query],
    *,
    fp32_on_cpu: bool = True,
    on_progress: Callable[[int, int], None] | None = None,
) -> Retrieval:
    """Measure what `check_retrieval` has passed, as `evaluate_retrieval` does. Collective: all ranks."""
    from megatron_7b.checkpoint.open_model import opened_model
    from megatron_7b.evaluation.vectors import embed_texts

    right: dict[str, set[str]] = {}
    for one in queries:
        right.setdefault(one.query, set()).add(one.positive)
    documents = list(dict.fromkeys(text for one in queries for text in (one.positive, *one.negatives)))
    carried = tokenizer_path(folder)
    assert carried is not None
    tokenizer, is_main = load_tokenizer(carried), os.environ.get("RANK", "0") == "0"
    with opened_model(folder, config, fp32_on_cpu=fp32_on_cpu) as model:
        vectors = embed_texts(model, tokenizer, [*right, *documents], on_progress=on_progress if is_main else None)
    places = {text: place for place, text in enumerate(documents)}
    return rank_documents(
        vectors[: len(right)], vectors[len(right) :], [{places[text] for text in texts} for texts in right.values()]
    )


def rank_documents(
    queries: NDArray[np.float32], documents: NDArray[np.float32], right: Sequence[set[int]]
) -> Retrieval:
    """Rank all documents for each query, and say how well.

    Args:
        queries: Vectors of length 1, [q, h].
        documents: Vectors of length 1, [d, h].
        right: Which documents are right for each query, [q], at least one.
    """
    depth = min(_DEPTH, len(documents))
    discounts = 1 / np.log2(np.arange(2, depth + 2))
    recalls, gains, reciprocals = dict.fromkeys(CUTS, 0.0), 0.0, 0.0
    for vector, wanted in zip(queries, right, strict=True):
        first = np.argsort(-(documents @ vector), kind="stable")[:depth]
        hits = np.isin(first, list(wanted))
        for cut in CUTS:
            recalls[cut] += hits[:cut].sum() / len(wanted)
        gains += float((hits * discounts).sum() / discounts[: len(wanted)].sum())
        reciprocals += 1 / (1 + int(hits.argmax())) if hits.any() else 0.0
    count = max(1, len(queries))
    recall = {cut: total / count for cut, total in recalls.items()}
    return Retrieval(len(queries), len(documents), recall, gains / count, reciprocals / count)
