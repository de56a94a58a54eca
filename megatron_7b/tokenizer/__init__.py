"""One protocol for Hugging Face, SentencePiece, tiktoken and byte tokenizers; training a BPE; fast engines."""

from megatron_7b.tokenizer.base import Tokenizer
from megatron_7b.tokenizer.load import TokenizerKind, load_tokenizer

__all__ = ["Tokenizer", "TokenizerKind", "load_tokenizer"]
