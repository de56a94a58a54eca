"""The next token, from all before it."""

from collections.abc import Mapping
from dataclasses import replace

from megatron_7b.config.schema import RunConfig
from megatron_7b.data import Dataset, open_sequential, open_split
from megatron_7b.data.samples.fill_in_the_middle import find_fim_ids
from megatron_7b.data.samples.opening import UNKNOWN_CONTENTS
from megatron_7b.data.samples.sample_order import Reached
from megatron_7b.data.samples.split import Split
from megatron_7b.errors import ConfigError
from megatron_7b.objective.token_losses import TokenLosses
from megatron_7b.tokenizer import Tokenizer


class CausalLanguageModeling(TokenLosses):
    """Every token of a window but the first is predicted; documents and their ends are treated as `data.*` says."""

    needs_tokenizer = False

    def check_tokenizer(self, config: RunConfig, tokenizer: Tokenizer | None) -> None:
        """Any will do; options that need more of it say so."""

    def open_windows(
        self,
        config: RunConfig,
        split: Split,
        *,
        contents: Mapping[str, str] = UNKNOWN_CONTENTS,
        reached: Reached | None = None,
    ) -> Dataset:
        """Open the windows, without what needs the tokenizer and has no influence on what is read."""
        data = replace(config.data, eod_mask_loss=False, fim_rate=0.0)
        return open_split(data, split, seed=config.training.seed, contents=contents, reached=reached)

    def open_split(
        self,
        config: RunConfig,
        split: Split,
        tokenizer: Tokenizer | None,
        *,
        contents: Mapping[str, str],
        reached: Reached | None,
    ) -> Dataset:
        """Open windows of the stream of documents."""
        return open_split(
            config.data,
            split,
            seed=config.training.seed,
            vocab_size=config.model.vocab_size,
            eod_id=tokenizer.eod_id if tokenizer is not None else None,
            fim_ids=find_fim_ids(config.data, tokenizer),
            contents=contents,
            reached=reached,
        )

    def open_corpus(self, prefix: str, config: RunConfig, tokenizer: Tokenizer | None) -> Dataset:
        """Open windows that predict every token but the first once."""
        eod_id = tokenizer.eod_id if tokenizer is not None else None
        if config.data.eod_mask_loss and eod_id is None:
            raise ConfigError(
                "data.eod_mask_loss is set, but the checkpoint carries no tokenizer with an end-of-document token",
                hint="--data.eod-mask-loss False counts every prediction",
            )
        return open_sequential(
            prefix,
            seq_length=config.data.seq_length,
            vocab_size=config.model.vocab_size,
            masked_eod=eod_id if config.data.eod_mask_loss else None,
            document_boundaries=config.data.reset_attention_mask,
            reset_position_ids=config.data.reset_position_ids,
        )
