"""One protocol for Hugging Face, SentencePiece, tiktoken and byte tokenizers; training a BPE; fast engines."""

from megatron_7b.tokenizer.base import SpecialRole, Tokenizer
from megatron_7b.tokenizer.load import TokenizerKind, load_tokenizer

__all__ = ["SpecialRole", "Tokenizer", "TokenizerKind", "load_tokenizer"]
