"""What a byte-pair vocabulary shall be; needs no tokenizer library."""

from dataclasses import dataclass

from megatron_7b.errors import ConfigError

DEFAULT_SPECIAL_TOKENS = ("<|endoftext|>", "<|pad|>")
NUM_BYTES = 256


@dataclass(frozen=True, kw_only=True)
class BpeOptions:
    """What the vocabulary shall be."""

    vocab_size: int
    """All of it: bytes, merges and special tokens."""
    special_tokens: tuple[str, ...] = DEFAULT_SPECIAL_TOKENS
    """They get the first ids. The first one ends documents; bos and pad are found by their usual names, else they are
    the first one too. [CLS], [SEP] and [MASK] get the roles that an encoder needs."""
    split_digits: bool = False
    """Each digit is a token of its own, which helps arithmetic."""
    byte_fallback: bool = False
    """Begin with characters instead of bytes, as SentencePiece models do; the rare ones are spelled in bytes."""
    min_frequency: int = 2
    """Pairs seen less often are not merged."""
    model_max_length: int = 2048
    """Tokens; only written into the settings."""
    show_progress: bool = False


def check_bpe_options(options: BpeOptions) -> None:
    """Refuse what is impossible, before a corpus is read.

    Raises:
        ConfigError: Too small a vocabulary, or special tokens that are missing, empty or double.
    """
    special = options.special_tokens
    if not special or "" in special or len(set(special)) != len(special):
        raise ConfigError(f"special tokens {list(special)}: expected at least one, none empty, none twice")
    smallest = NUM_BYTES + len(special)
    if options.vocab_size < smallest:
        raise ConfigError(
            f"vocabulary size {options.vocab_size} is too small: expected at least {smallest} "
            f"({NUM_BYTES} bytes and {len(special)} special tokens)"
        )
