"""One protocol for Hugging Face, SentencePiece, tiktoken and byte tokenizers; training a BPE; fast engines."""

from megatron_7b.tokenizer.base import SpecialRole, Tokenizer
from megatron_7b.tokenizer.bpe_options import BpeOptions
from megatron_7b.tokenizer.description import TokenizerDescription, compare_with_transformers, describe_for_people
from megatron_7b.tokenizer.load import TokenizerKind, load_tokenizer

__all__ = [
    "BpeOptions",
    "SpecialRole",
    "Tokenizer",
    "TokenizerDescription",
    "TokenizerKind",
    "compare_with_transformers",
    "describe_for_people",
    "load_tokenizer",
]
