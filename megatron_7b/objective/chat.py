"""The assistant's words in conversations, from all before them (supervised fine-tuning)."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from megatron_7b.config.schema import RunConfig
from megatron_7b.data.records.rows import RecordDataset, RecordLayout, open_records, open_whole_corpus
from megatron_7b.data.samples.opening import UNKNOWN_CONTENTS
from megatron_7b.data.samples.sample_order import Reached
from megatron_7b.data.samples.split import Split
from megatron_7b.objective.objective import Sums
from megatron_7b.objective.records import layout_of
from megatron_7b.objective.token_losses import TokenLosses
from megatron_7b.tokenizer import Tokenizer

if TYPE_CHECKING:
    from torch import Tensor


class ConversationTraining(TokenLosses):
    """Samples are rows of whole conversations; the loss is the mean over the tokens that count.

    A token's weight scales its loss, not the number that the sum is divided by.
    """

    needs_tokenizer = False

    def check_tokenizer(self, config: RunConfig, tokenizer: Tokenizer | None) -> None:
        """Any will do: the corpora are encoded already."""

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
        """Open rows of conversations."""
        return open_records(config.data, split, _layout(config, tokenizer), contents=contents, reached=reached)

    def window_length(self, config: RunConfig) -> int:  # noqa: ARG002
        """Any conversation makes a sample, however short it is."""
        return 0

    def open_corpus(self, prefix: str, config: RunConfig, tokenizer: Tokenizer | None) -> RecordDataset:
        """Open all conversations of a corpus, once and in their order."""
        return open_whole_corpus(prefix, _layout(config, tokenizer))

    def sums(self, output: "Tensor", inputs: Mapping[str, Any]) -> Sums:
        """Return the weighted sum of losses and the number of tokens that count."""
        return super().sums(output, {**inputs, "loss_mask": inputs["loss_mask"] != 0})


def _layout(config: RunConfig, tokenizer: Tokenizer | None) -> RecordLayout:
    return layout_of(config, tokenizer, name="conversations")
