"""Corpora, the order of their samples, and batches. Imports neither torch nor transformers."""

from megatron_7b.data.blend import BlendPart, parse_blend
from megatron_7b.data.dataset import Batch, Dataset, DatasetPart
from megatron_7b.data.indexed_dataset import IndexedDataset, IndexWriter, resolve_prefix, token_bytes_for
from megatron_7b.data.loader import BatchLoader, microbatch_indices
from megatron_7b.data.opening import has_split, open_sequential, open_split
from megatron_7b.data.split import Split, document_range, parse_split

__all__ = [
    "Batch",
    "BatchLoader",
    "BlendPart",
    "Dataset",
    "DatasetPart",
    "IndexWriter",
    "IndexedDataset",
    "Split",
    "document_range",
    "has_split",
    "microbatch_indices",
    "open_sequential",
    "open_split",
    "parse_blend",
    "parse_split",
    "resolve_prefix",
    "token_bytes_for",
]
