"""Hidden tokens of a sentence, from all others around them (BERT)."""

from collections.abc import Mapping

from megatron_7b.config.schema import RunConfig
from megatron_7b.data import open_sequential
from megatron_7b.data.masked_language_model import (
    NUM_FRAME_TOKENS,
    MaskedLanguageModelDataset,
    Masking,
    find_word_beginnings,
    open_masked_split,
)
from megatron_7b.data.sample_order import Reached
from megatron_7b.data.split import Split
from megatron_7b.errors import ConfigError
from megatron_7b.objective.token_losses import TokenLosses
from megatron_7b.tokenizer import Tokenizer


class MaskedLanguageModeling(TokenLosses):
    """Samples are windows between [CLS] and [SEP], of which some words are hidden."""

    def predicted_share(self, config: RunConfig) -> float:
        """Only hidden tokens are predicted."""
        return config.objective.masked_share

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


def build_masking(config: RunConfig, tokenizer: Tokenizer | None) -> Masking:
    """Return how tokens are hidden, with the special tokens of the tokenizer.

    Raises:
        ConfigError: The tokenizer is not known, or lacks one of them.
    """
    if tokenizer is None:
        raise ConfigError(
            "objective.name is masked, but no tokenizer is known that has [CLS], [SEP] and [MASK]",
            hint="name it as data.tokenizer",
        )
    assert config.model.vocab_size is not None
    ids = {role: tokenizer.special_id(role) for role in ("cls", "sep", "mask")}
    missing = [f"[{role.upper()}]" for role, found in ids.items() if found is None]
    if missing:
        raise ConfigError(
            f"objective.name is masked, but the tokenizer ({tokenizer.path}) has no {', '.join(missing)}",
            hint="use a tokenizer of BERT's kind, or train one with "
            "`megatron-7b tokenizer train --special-tokens '[PAD]' '[CLS]' '[SEP]' '[MASK]'`",
        )
    objective = config.objective
    begins_word = None
    if objective.whole_words:
        begins_word = find_word_beginnings(tokenizer.spell(token) or "" for token in range(config.model.vocab_size))
    return Masking(
        mask_id=ids["mask"] or 0,
        cls_id=ids["cls"] or 0,
        sep_id=ids["sep"] or 0,
        vocab_size=config.model.vocab_size,
        special_ids=tokenizer.special_ids,
        begins_word=begins_word,
        masked_share=objective.masked_share,
        max_ngram=objective.max_ngram,
    )
