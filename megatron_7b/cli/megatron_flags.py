"""What Megatron's `tools/preprocess_data.py` takes and `preprocess` does not, each with what to do instead."""

from collections.abc import Sequence

from megatron_7b.errors import ConfigError

_SPECIAL = "the tokenizer's own special tokens are taken; add others to its tokenizer.json"
_TIKTOKEN = (
    'FILE.tiktoken.json beside FILE.tiktoken holds it: {"pattern": …, "special_tokens": {TEXT: ID}, "eod_token": …}'
)
_WORKERS = "workers are threads of one process, and all cores are the default"

TOKENIZER_TYPES = {
    "MultimodalTokenizer": "only text is read",
    "NullMultimodalTokenizer": "only text is read",
    "NullTokenizer": "text is tokenized here; what is tokenized already, `megatron_7b.data.IndexWriter` writes",
    "SFTTokenizer": "conversations are not read; write them as text with the model's chat template first",
}

_FLAGS = {
    "--vocab-size": "the tokenizer says it",
    "--padded-vocab-size": "the vocabulary is padded where a model is built, not in a corpus",
    "--make-vocab-size-divisible-by": "the vocabulary is padded where a model is built, not in a corpus",
    "--vocab-extra-ids": _SPECIAL,
    "--tokenizer-special-tokens": _SPECIAL,
    "--tokenizer-metadata": "files show what kind of tokenizer they hold; --tokenizer-type overrides it",
    "--tokenizer-hf-no-use-fast": "a Hugging Face tokenizer is its tokenizer.json",
    "--tokenizer-sentencepiece-legacy": "text that looks like a control token stays text",
    "--tiktoken-pattern": _TIKTOKEN,
    "--tiktoken-num-special-tokens": _TIKTOKEN,
    "--trust-remote-code": "no code of a tokenizer is ever run",
    "--chat-template": "conversations are not read; write them as text with the template first",
    "--use-gigatoken": "--engine gigatoken; the default, fastokens, is as fast and takes less memory",
    "--keep-newlines": "sentences are cut as nltk cuts them, without the white space between",
    "--find-optimal-num-workers": _WORKERS,
    "--workers-to-check": _WORKERS,
    "--max-documents": _WORKERS,
    "--dataset-impl": "mmap is the only format",
}


def explain_unknown(arguments: Sequence[str]) -> None:
    """Say what to do instead of Megatron's options among those that the parser does not know.

    Raises:
        ConfigError: There are some.
    """
    names = dict.fromkeys(argument.partition("=")[0] for argument in arguments)
    if known := [f"{name} is not taken here: {_FLAGS[name]}" for name in names if name in _FLAGS]:
        raise ConfigError("\n".join(known))
