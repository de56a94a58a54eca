"""Writes a tokenizer of any kind as tokenizer.json, the one form that every reader of Hugging Face folders knows."""

from pathlib import Path

from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from megatron_7b.conversion.reference import reported
from megatron_7b.tokenizer import Tokenizer
from megatron_7b.tokenizer.byte_level import byte_characters
from megatron_7b.tokenizer.tiktoken_file import TiktokenTokenizer

_ROLES = {"eos_token": "eod_id", "bos_token": "bos_id", "pad_token": "pad_id"}


def write_tokenizer_json(tokenizer: Tokenizer, folder: Path) -> dict[str, str]:
    """Write tokenizer.json.

    The control tokens of the byte tokenizer, which have no text, get the usual names; so a document that spells such a
    name gets the token from transformers.

    Args:
        tokenizer: The tokenizer.
        folder: A folder with its own files.

    Returns:
        What tokenizer_config.json has to say: which of its tokens end, begin and fill a text.

    Raises:
        ConversionError: Transformers cannot read the files of a SentencePiece model.
    """
    if tokenizer.kind == "bytes":
        backend = _byte_level(tokenizer)
    elif isinstance(tokenizer, TiktokenTokenizer):
        backend = _from_ranks(tokenizer, folder)
    else:
        backend = _from_files(folder)
    backend.save(str(folder / "tokenizer.json"))
    return {role: str(backend.id_to_token(token)) for role, token in _role_ids(tokenizer).items()}


def _role_ids(tokenizer: Tokenizer) -> dict[str, int]:
    ids = {role: getattr(tokenizer, name) for role, name in _ROLES.items()}
    return {role: token for role, token in ids.items() if token is not None}


def _byte_level(tokenizer: Tokenizer) -> Backend:
    """Return one token per byte, spelled as byte-level tokenizers spell bytes."""
    splitter = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    vocabulary = {character: byte for byte, character in byte_characters().items()}
    backend = Backend(models.BPE(vocabulary, []))
    backend.pre_tokenizer = splitter
    backend.decoder = decoders.ByteLevel()
    names = {"eos_token": "<|endoftext|>", "bos_token": "<|bos|>", "pad_token": "<|pad|>"}
    roles = sorted(_role_ids(tokenizer).items(), key=lambda role: role[1])
    backend.add_special_tokens([AddedToken(names[role], special=True) for role, _ in roles])
    return backend


def _from_ranks(tokenizer: TiktokenTokenizer, folder: Path) -> Backend:
    """Return what transformers makes of tiktoken ranks, every id above them named."""
    from transformers.convert_slow_tokenizer import TikTokenConverter

    assert tokenizer.path is not None
    spelled = {token: name for name, token in tokenizer.settings.special_tokens.items()}
    with reported(f"transformers cannot convert the tiktoken ranks in {folder}"):
        num_ranks = len(TikTokenConverter.load_tiktoken_bpe(str(tokenizer.path)))
        special = [spelled.get(token, f"<|reserved_{token}|>") for token in range(num_ranks, tokenizer.vocab_size)]
        converter = TikTokenConverter(
            vocab_file=str(tokenizer.path), pattern=tokenizer.settings.pattern, extra_special_tokens=special
        )
        backend: Backend = converter.converted()
    return backend


def _from_files(folder: Path) -> Backend:
    from transformers import PreTrainedTokenizerFast

    with reported(f"transformers cannot load the tokenizer in {folder}"):
        backend: Backend = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True).backend_tokenizer
    return backend
