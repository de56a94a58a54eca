"""Objectives whose samples are rows of records, which a task of fine-tuning has prepared."""

from collections.abc import Mapping

from megatron_7b.config.schema import RunConfig
from megatron_7b.data.records.rows import RecordDataset, RecordLayout, open_records, open_whole_corpus
from megatron_7b.data.samples.opening import UNKNOWN_CONTENTS
from megatron_7b.data.samples.sample_order import Reached
from megatron_7b.data.samples.split import Split
from megatron_7b.objective.token_losses import TokenLosses
from megatron_7b.tokenizer import Tokenizer


class RecordObjective(TokenLosses):
    """The part that such objectives share: where their samples come from.

    Attributes:
        kind: What the records are, in the plural, as their corpora are marked.
    """

    kind: str
    needs_tokenizer = False

    def check_tokenizer(self, config: RunConfig, tokenizer: Tokenizer | None) -> None:
        """Any will do: the corpora are encoded already."""

    def window_length(self, config: RunConfig) -> int:  # noqa: ARG002
        """Any record makes a sample, however short it is."""
        return 0

    def open_windows(
        self,
        config: RunConfig,
        split: Split,
        *,
        contents: Mapping[str, str] = UNKNOWN_CONTENTS,
        reached: Reached | None = None,
    ) -> RecordDataset:
        """Open the rows, with any token in the places that are filled up."""
        return self.open_split(config, split, None, contents=contents, reached=reached)

    def open_split(
        self,
        config: RunConfig,
        split: Split,
        tokenizer: Tokenizer | None,
        *,
        contents: Mapping[str, str],
        reached: Reached | None,
    ) -> RecordDataset:
        """Open the rows of a split."""
        layout = self._layout(config, tokenizer)
        return open_records(config.data, split, layout, contents=contents, reached=reached)

    def open_corpus(self, prefix: str, config: RunConfig, tokenizer: Tokenizer | None) -> RecordDataset:
        """Open all records of a corpus, once and in their order."""
        return open_whole_corpus(prefix, self._layout(config, tokenizer))

    def _layout(self, config: RunConfig, tokenizer: Tokenizer | None) -> RecordLayout:
        """Any token may fill up rows: nothing attends to it."""
        known = (tokenizer.pad_id, tokenizer.eod_id) if tokenizer is not None else ()
        return RecordLayout(
            seq_length=config.data.seq_length,
            seed=config.training.seed,
            packed=config.finetune.packing,
            pad_id=next((token for token in known if token is not None), 0),
            name=self.kind,
        )
