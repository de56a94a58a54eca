"""Corpora, the order of their samples, and batches. Imports neither torch nor transformers."""

from megatron_7b.config.blend import BlendPart
from megatron_7b.data.corpus.indexed_dataset import IndexedDataset, IndexWriter, resolve_prefix, token_bytes_for
from megatron_7b.data.corpus.show import corpus_statistics, show_corpus
from megatron_7b.data.preprocess.preprocessing import PreprocessOptions, preprocess_files
from megatron_7b.data.reading.tokenizer_training import TrainedTokenizer, train_tokenizer
from megatron_7b.data.samples.blend import parse_blend
from megatron_7b.data.samples.dataset import Batch, Dataset, DatasetPart
from megatron_7b.data.samples.loader import BatchLoader, microbatch_indices
from megatron_7b.data.samples.opening import open_sequential, open_split
from megatron_7b.data.samples.sets import has_split
from megatron_7b.data.samples.split import Split, document_range, parse_split
from megatron_7b.data.upkeep.adopt import adopt_corpus
from megatron_7b.data.upkeep.merge import merge_corpora
from megatron_7b.data.upkeep.verify import verify_corpora

__all__ = [
    "Batch",
    "BatchLoader",
    "BlendPart",
    "Dataset",
    "DatasetPart",
    "IndexWriter",
    "IndexedDataset",
    "PreprocessOptions",
    "Split",
    "TrainedTokenizer",
    "adopt_corpus",
    "corpus_statistics",
    "document_range",
    "has_split",
    "merge_corpora",
    "microbatch_indices",
    "open_sequential",
    "open_split",
    "parse_blend",
    "parse_split",
    "preprocess_files",
    "resolve_prefix",
    "show_corpus",
    "token_bytes_for",
    "train_tokenizer",
    "verify_corpora",
]
