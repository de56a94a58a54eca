"""Hidden tokens of a sentence, from all others around them (BERT)."""

from collections.abc import Mapping

from megatron_7b.config.schema import RunConfig
from megatron_7b.data import Dataset, open_sequential, open_split
from megatron_7b.data.samples.masked_language_model import (
    NUM_FRAME_TOKENS,
    MaskedLanguageModelDataset,
    Masking,
    find_word_beginnings,
    open_masked_split,
    windows_of_samples,
)
from megatron_7b.data.samples.opening import UNKNOWN_CONTENTS
from megatron_7b.data.samples.sample_order import Reached
from megatron_7b.data.samples.split import Split
from megatron_7b.errors import ConfigError
from megatron_7b.objective.token_losses import TokenLosses
from megatron_7b.tokenizer import SpecialRole, Tokenizer

_ROLES: tuple[SpecialRole, ...] = ("cls", "sep", "mask")


class MaskedLanguageModeling(TokenLosses):
    """Samples are windows between [CLS] and [SEP], of which some words are hidden."""

    needs_tokenizer = True

    def check_tokenizer(self, config: RunConfig, tokenizer: Tokenizer | None) -> None:  # noqa: ARG002
        """It must have [CLS], [SEP] and [MASK], whatever it calls them."""
        find_special_tokens(tokenizer)

    def predicted_share(self, config: RunConfig) -> float:
        """Only hidden tokens are predicted."""
        return config.objective.masked_share

    def open_windows(
        self,
        config: RunConfig,
        split: Split,
        *,
        contents: Mapping[str, str] = UNKNOWN_CONTENTS,
        reached: Reached | None = None,
    ) -> Dataset:
        """Open the windows as they are before anything is hidden, without their frame."""
        data = windows_of_samples(config.data)
        return open_split(data, split, seed=config.training.seed, contents=contents, reached=reached)

    def open_split(
        self,
        config: RunConfig,
        split: Split,
        tokenizer: Tokenizer | None,
        *,
        contents: Mapping[str, str],
        reached: Reached | None,
    ) -> MaskedLanguageModelDataset:
        """Open masked windows of the stream of documents."""
        masking = build_masking(config, tokenizer)
        return open_masked_split(
            config.data, split, masking, seed=config.training.seed, contents=contents, reached=reached
        )

    def open_corpus(self, prefix: str, config: RunConfig, tokenizer: Tokenizer | None) -> MaskedLanguageModelDataset:
        """Open a corpus window by window; what is hidden follows from the run's seed."""
        masking = build_masking(config, tokenizer)
        windows = open_sequential(
            prefix, seq_length=config.data.seq_length - NUM_FRAME_TOKENS, vocab_size=masking.vocab_size
        )
        return MaskedLanguageModelDataset(windows, masking, seed=config.training.seed)


def find_special_tokens(tokenizer: Tokenizer | None) -> tuple[int, int, int]:
    """Return the ids of [CLS], [SEP] and [MASK].

    Raises:
        ConfigError: The tokenizer is not known, or lacks one of them.
    """
    if tokenizer is None:
        raise ConfigError(
            "masked language modeling needs [CLS], [SEP] and [MASK], but the tokenizer of the corpora is not known",
            hint="name it as data.tokenizer",
        )
    cls, sep, mask = (tokenizer.special_id(role) for role in _ROLES)
    if cls is None or sep is None or mask is None:
        missing = [name for name, found in (("[CLS]", cls), ("[SEP]", sep), ("[MASK]", mask)) if found is None]
        place = f" ({tokenizer.path})" if tokenizer.path is not None else ""
        raise ConfigError(
            f"masked language modeling hides tokens, but the tokenizer{place} has no {', '.join(missing)}",
            hint="preprocess the text with a tokenizer of BERT's kind, such as one from `megatron-7b tokenizer train "
            "--special-tokens '<|endoftext|>' '[PAD]' '[CLS]' '[SEP]' '[MASK]'`",
        )
    return cls, sep, mask


def build_masking(config: RunConfig, tokenizer: Tokenizer | None) -> Masking:
    """Return how tokens are hidden, with the special tokens of the tokenizer.

    Raises:
        ConfigError: The tokenizer is not known, or lacks one of them.
    """
    cls, sep, mask = find_special_tokens(tokenizer)
    assert tokenizer is not None
    assert config.model.vocab_size is not None
    objective, begins_word = config.objective, None
    if objective.whole_words:
        begins_word = find_word_beginnings(tokenizer.spell(token) or "" for token in range(config.model.vocab_size))
    return Masking(
        mask_id=mask,
        cls_id=cls,
        sep_id=sep,
        vocab_size=config.model.vocab_size,
        special_ids=tokenizer.special_ids,
        begins_word=begins_word,
        masked_share=objective.masked_share,
        max_ngram=objective.max_ngram,
    )
