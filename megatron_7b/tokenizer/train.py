"""Training a BPE over bytes or over characters, written as a complete Hugging Face folder."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from megatron_7b.errors import DataFormatError
from megatron_7b.files import replace_text
from megatron_7b.tokenizer.bpe_options import NUM_BYTES, BpeOptions, check_bpe_options

_BOS_NAMES = ("<|begin_of_text|>", "<|bos|>", "<s>", "<bos>")
_PAD_NAMES = ("<|pad|>", "<pad>", "[PAD]")
_ENCODER_ROLES = {"cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
# GPT-2's, as tokenizers' ByteLevel has it inside.
_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def train_bpe(texts: Iterator[Sequence[str]], options: BpeOptions) -> Tokenizer:
    """Train on a stream of batches of texts; memory grows with the number of different words.

    Without spaces a word ends at the next mark, nearly all are different, and memory is 40 to 90 times the text.

    Raises:
        ConfigError: See `check_bpe_options`.
        DataFormatError: The stream holds no text.
    """
    check_bpe_options(options)
    seen = _Seen()
    train = _train_on_characters if options.byte_fallback else _train_on_bytes
    tokenizer = train(seen.watch(texts), options)
    if not seen.characters:
        raise DataFormatError("the corpus has no text to train a tokenizer on")
    return tokenizer


def _train_on_bytes(texts: Iterator[Sequence[str]], options: BpeOptions) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = _pre_tokenizer(pre_tokenizers.ByteLevel(add_prefix_space=False), options)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=options.vocab_size,
        min_frequency=options.min_frequency,
        special_tokens=list(options.special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=options.show_progress,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _train_on_characters(texts: Iterator[Sequence[str]], options: BpeOptions) -> Tokenizer:
    """Spaces stay what they are, so that every text comes back from its tokens."""
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = _pre_tokenizer(pre_tokenizers.Split(Regex(_WORDS), "isolated"), options)
    reserved = [*options.special_tokens, *(f"<0x{byte:02X}>" for byte in range(NUM_BYTES))]
    size = options.vocab_size - len(reserved)
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=options.min_frequency,
        special_tokens=[],
        limit_alphabet=size // 2,  # the most frequent characters: the others are spelled in bytes
        show_progress=options.show_progress,
    )
    learner.train_from_iterator(texts, trainer)
    # The trainer can reserve ids for special tokens only, which would match the text "<0x41>".
    learned = json.loads(learner.to_str())["model"]
    vocabulary = {
        token: index for index, token in enumerate([*reserved, *sorted(learned["vocab"], key=learned["vocab"].get)])
    }
    merges = [(left, right) for left, right in learned["merges"]]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True))
    tokenizer.pre_tokenizer = learner.pre_tokenizer
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(list(options.special_tokens))
    return tokenizer


def _pre_tokenizer(words: Any, options: BpeOptions) -> Any:
    """Return what parts a text into the pieces that no token goes beyond."""
    if not options.split_digits:
        return words
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), words])


def save_hugging_face_folder(tokenizer: Tokenizer, options: BpeOptions, folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and special_tokens_map.json, each beside and then renamed."""
    folder.mkdir(parents=True, exist_ok=True)
    special = options.special_tokens
    roles = {
        "eos_token": special[0],
        "bos_token": next((token for token in special if token in _BOS_NAMES), special[0]),
        "pad_token": next((token for token in special if token in _PAD_NAMES), special[0]),
        **{role: token for role, token in _ENCODER_ROLES.items() if token in special},
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **roles,
        "model_max_length": options.model_max_length,
        "clean_up_tokenization_spaces": False,
    }
    replace_text(folder / "tokenizer.json", tokenizer.to_str(pretty=True))
    replace_text(folder / "special_tokens_map.json", json.dumps(roles, indent=2, ensure_ascii=False) + "\n")
    replace_text(folder / "tokenizer_config.json", json.dumps(settings, indent=2, ensure_ascii=False) + "\n")


class _Seen:
    """Counts what passes through."""

    def __init__(self) -> None:
        self.characters = 0

    def watch(self, batches: Iterator[Sequence[str]]) -> Iterator[Sequence[str]]:
        for batch in batches:
            self.characters += sum(map(len, batch))
            yield batch
