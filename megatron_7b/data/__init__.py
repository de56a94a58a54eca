"""Corpora, the order of their samples, and batches. Imports neither torch nor transformers."""

from megatron_7b.data.corpus.indexed_dataset import IndexedDataset, IndexWriter, resolve_prefix, token_bytes_for
from megatron_7b.data.reading.tokenizer_training import TrainedTokenizer, train_tokenizer
from megatron_7b.data.samples.blend import BlendPart, parse_blend
from megatron_7b.data.samples.dataset import Batch, Dataset, DatasetPart
from megatron_7b.data.samples.loader import BatchLoader, microbatch_indices
from megatron_7b.data.samples.opening import has_split, open_sequential, open_split
from megatron_7b.data.samples.split import Split, document_range, parse_split

__all__ = [
    "Batch",
    "BatchLoader",
    "BlendPart",
    "Dataset",
    "DatasetPart",
    "IndexWriter",
    "IndexedDataset",
    "Split",
    "TrainedTokenizer",
    "document_range",
    "has_split",
    "microbatch_indices",
    "open_sequential",
    "open_split",
    "parse_blend",
    "parse_split",
    "resolve_prefix",
    "token_bytes_for",
    "train_tokenizer",
]
