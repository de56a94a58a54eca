"""The assistant's words in conversations, from all before them (supervised fine-tuning)."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from megatron_7b.config.schema import RunConfig
from megatron_7b.data.conversations.dataset import ConversationDataset, open_conversations
from megatron_7b.data.samples.opening import UNKNOWN_CONTENTS
from megatron_7b.data.samples.sample_order import Reached
from megatron_7b.data.samples.sets import whole_corpus
from megatron_7b.data.samples.split import Split
from megatron_7b.objective.objective import Sums
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
    ) -> ConversationDataset:
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
    ) -> ConversationDataset:
        """Open rows of conversations."""
        return open_conversations(
            config.data,
            split,
            seed=config.training.seed,
            packed=config.finetune.packing,
            pad_id=_padding(tokenizer),
            contents=contents,
            reached=reached,
        )

    def window_length(self, config: RunConfig) -> int:  # noqa: ARG002
        """Any conversation makes a sample, however short it is."""
        return 0

    def open_corpus(self, prefix: str, config: RunConfig, tokenizer: Tokenizer | None) -> ConversationDataset:
        """Open all conversations of a corpus, once and in their order."""
        return ConversationDataset(
            whole_corpus(prefix),
            seq_length=config.data.seq_length,
            seed=config.training.seed,
            packed=config.finetune.packing,
            pad_id=_padding(tokenizer),
            shuffle=False,
        )

    def sums(self, output: "Tensor", inputs: Mapping[str, Any]) -> Sums:
        """Return the weighted sum of losses and the number of tokens that count."""
        return super().sums(output, {**inputs, "loss_mask": inputs["loss_mask"] != 0})


def _padding(tokenizer: Tokenizer | None) -> int:
    """Any token will do: nothing attends to what fills up a row."""
    known = (tokenizer.pad_id, tokenizer.eod_id) if tokenizer is not None else ()
    return next((token for token in known if token is not None), 0)
