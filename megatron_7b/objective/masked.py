"""Hidden tokens of a sentence, from all others around them (BERT); and whether two texts follow one another."""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from megatron_7b.config.schema import DataConfig, RunConfig
from megatron_7b.data import open_sequential, open_split
from megatron_7b.data.samples.chinese_words import ChineseWords, check_segmenter
from megatron_7b.data.samples.dataset import NumberedSamples
from megatron_7b.data.samples.framed_text import NUM_FRAME_TOKENS, Frame, FramedSource, FramedWindows
from megatron_7b.data.samples.masked_language_model import MaskedLanguageModelDataset
from megatron_7b.data.samples.masking import Masking, find_word_beginnings
from megatron_7b.data.samples.padded_text import PaddedTexts, Padding
from megatron_7b.data.samples.sample_order import Reached
from megatron_7b.data.samples.sets import UNKNOWN_CONTENTS, find_sets, whole_corpus
from megatron_7b.data.samples.split import Split
from megatron_7b.errors import ConfigError
from megatron_7b.objective.objective import Sums
from megatron_7b.objective.token_losses import TokenLosses
from megatron_7b.tokenizer import SpecialRole, Tokenizer

if TYPE_CHECKING:
    from megatron_7b.data import Batch
    from megatron_7b.model.kinds.encoder.network import EncoderOutput

_NAMES: dict[SpecialRole, str] = {"cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]", "pad": "[PAD]"}


class MaskedLanguageModeling(TokenLosses):
    """Samples are framed texts, single ones or pairs, of which some words are hidden.

    Args:
        config: The run.
    """

    needs_tokenizer = True

    def __init__(self, config: RunConfig) -> None:
        objective = config.objective
        self._pairs, self._with_word_before = objective.sentence_pairs, objective.predict_word_before
        self._segmenter = objective.word_segmenter
        self._is_padded = objective.samples == "padded" or self._pairs != "none"
        reported = []
        if self._pairs != "none" or self._with_word_before:
            reported.append("masked_loss")
        if self._with_word_before:
            reported.append("word_before_loss")
        if self._pairs != "none":
            reported += [f"{self._pairs}_loss", f"{self._pairs}_accuracy"]
        self.reported = tuple(reported)

    def check_tokenizer(self, config: RunConfig, tokenizer: Tokenizer | None) -> None:  # noqa: ARG002
        """It must have [CLS], [SEP], [MASK] and for padding [PAD], whatever it calls them; and jieba must be there."""
        self._find_special_tokens(tokenizer)
        if self._segmenter != "none":
            check_segmenter()

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
    ) -> NumberedSamples:
        """Open the texts as they are before anything is hidden, without their frame."""
        seed, reads = config.training.seed, config.objective.masks_per_text
        if self._is_padded:
            how = _padding(config, None)
            return PaddedTexts(find_sets(config.data, split), how, None, seed=seed, contents=contents, reached=reached)
        data = windows_of_samples(config.data)
        return open_split(data, split, seed=seed, reads_per_window=reads, contents=contents, reached=reached)

    def open_split(
        self,
        config: RunConfig,
        split: Split,
        tokenizer: Tokenizer | None,
        *,
        contents: Mapping[str, str],
        reached: Reached | None,
    ) -> MaskedLanguageModelDataset:
        """Open the masked samples of a split."""
        masking, frame = self._masking(config, tokenizer)
        seed, reads = config.training.seed, config.objective.masks_per_text
        texts: FramedSource
        if self._is_padded:
            source, how = find_sets(config.data, split), _padding(config, tokenizer)
            texts = PaddedTexts(source, how, frame, seed=seed, contents=contents, reached=reached)
        else:
            windows = open_split(
                windows_of_samples(config.data), split, seed=seed, vocab_size=masking.vocab_size,
                reads_per_window=reads, contents=contents, reached=reached,
            )  # fmt: skip
            texts = FramedWindows(windows, frame, reads_per_window=reads)
        return MaskedLanguageModelDataset(texts, masking, seed=seed)

    def open_corpus(self, prefix: str, config: RunConfig, tokenizer: Tokenizer | None) -> MaskedLanguageModelDataset:
        """Open a corpus in its order, each text once for each mask; what is hidden follows from the run's seed."""
        masking, frame = self._masking(config, tokenizer)
        seed, reads = config.training.seed, config.objective.masks_per_text
        texts: FramedSource
        if self._is_padded:
            texts = PaddedTexts(whole_corpus(prefix), _padding(config, tokenizer), frame, seed=seed, shuffle=False)
        else:
            length = windows_of_samples(config.data).seq_length
            windows = open_sequential(prefix, seq_length=length, vocab_size=masking.vocab_size, reads_per_window=reads)
            texts = FramedWindows(windows, frame, reads_per_window=reads)
        return MaskedLanguageModelDataset(texts, masking, seed=seed)

    def states_compared(self, batch: "Batch") -> NDArray[np.bool_]:
        """Return all tokens but padding, [b, s], of samples in which something is hidden."""
        assert batch.cu_seqlens is not None
        starts = np.arange(len(batch.tokens)) * batch.tokens.shape[1]
        ends = batch.cu_seqlens[np.searchsorted(batch.cu_seqlens, starts, side="right")]  # a sample is one document
        is_text: NDArray[np.bool_] = np.arange(batch.tokens.shape[1]) < (ends - starts)[:, None]
        is_text &= (batch.loss_mask != 0).any(axis=1, keepdims=True)
        return is_text

    def sums(self, output: "EncoderOutput", inputs: Mapping[str, Any]) -> Sums:
        """Return the sum of the losses of predicted tokens, each with that of its pair, and what is reported.

        A pair counts as often as it has predicted tokens: so the loss is that of the tokens plus that of the pairs,
        each a mean, and the figure does not depend on how samples are grouped.
        """
        import torch

        weights = inputs["loss_mask"]
        num_tokens, loss = weights.sum(), output.masked
        before = weights.new_zeros(()) if output.word_before is None else inputs["is_word_before"].mul(weights).sum()
        reported = [(output.masked, num_tokens - before)]
        if output.word_before is not None:
            loss = loss + output.word_before
            reported.append((output.word_before, before))
        if output.pairs is not None:
            labels = inputs["pair_labels"]
            losses = torch.nn.functional.cross_entropy(output.pairs, labels, reduction="none")
            of_row = weights.view(len(labels), -1).sum(dim=1)
            is_read = of_row > 0  # after the end of a corpus there is nothing to count
            loss = loss + (of_row * losses).sum()
            is_right = (output.pairs.argmax(dim=1) == labels) & is_read
            reported += [((losses * is_read).sum(), is_read.sum()), (is_right.sum(), is_read.sum())]
        rows = [(loss, num_tokens), *(reported if self.reported else ())]
        means = torch.stack([torch.stack([part.detach().double() for part in row]) for row in rows])
        return Sums(loss, num_tokens.to(torch.int), means)

    def _find_special_tokens(self, tokenizer: Tokenizer | None) -> dict[SpecialRole, int]:
        """Return the ids of [CLS], [SEP] and [MASK], and where samples are padded of [PAD].

        Raises:
            ConfigError: The tokenizer is not known, or lacks one of them.
        """
        roles: tuple[SpecialRole, ...] = ("cls", "sep", "mask", *(("pad",) if self._is_padded else ()))
        names = [_NAMES[role] for role in roles]
        if tokenizer is None:
            raise ConfigError(
                f"masked language modeling needs {', '.join(names[:-1])} and {names[-1]}, but the tokenizer of the "
                "corpora is not known",
                hint="name it as data.tokenizer",
            )
        ids = {role: tokenizer.special_id(role) for role in roles}
        missing = [_NAMES[role] for role, found in ids.items() if found is None]
        if missing:
            place = f" ({tokenizer.path})" if tokenizer.path is not None else ""
            raise ConfigError(
                f"masked language modeling hides tokens, but the tokenizer{place} has no {', '.join(missing)}",
                hint="preprocess the text with a tokenizer of BERT's kind, such as one from `megatron-7b tokenizer "
                "train --special-tokens '<|endoftext|>' '[PAD]' '[CLS]' '[SEP]' '[MASK]'`",
            )
        return {role: found for role, found in ids.items() if found is not None}

    def _masking(self, config: RunConfig, tokenizer: Tokenizer | None) -> tuple[Masking, Frame]:
        """Return how tokens are hidden, and what stands around texts.

        Raises:
            ConfigError: The tokenizer is not known, or lacks a token; or the segmenter is not installed.
        """
        ids = self._find_special_tokens(tokenizer)
        assert tokenizer is not None
        assert config.model.vocab_size is not None
        objective, begins_word, segmenter = config.objective, None, None
        if objective.whole_words:
            pieces = [tokenizer.spell(token) or "" for token in range(config.model.vocab_size)]
            begins_word = find_word_beginnings(pieces)
            segmenter = ChineseWords(pieces) if objective.word_segmenter == "jieba" else None
        masking = Masking(
            mask_id=ids["mask"],
            vocab_size=config.model.vocab_size,
            special_ids=tokenizer.special_ids | set(ids.values()),
            begins_word=begins_word,
            segmenter=segmenter,
            masked_share=objective.masked_share,
            max_ngram=objective.max_ngram,
            masks_per_text=objective.masks_per_text,
            with_word_before=objective.predict_word_before,
        )
        return masking, Frame(cls_id=ids["cls"], sep_id=ids["sep"], pad_id=ids.get("pad"))


def windows_of_samples(data: DataConfig) -> DataConfig:
    """Return how the text within the frames of full samples is read.

    Raises:
        ConfigError: There is no room for text.
    """
    if data.seq_length <= NUM_FRAME_TOKENS:
        raise ConfigError(f"data.seq_length is {data.seq_length}, expected room for [CLS], [SEP] and text")
    length = data.seq_length - NUM_FRAME_TOKENS
    return dataclasses.replace(data, seq_length=length, eod_mask_loss=False, fim_rate=0.0)


def _padding(config: RunConfig, tokenizer: Tokenizer | None) -> Padding:
    objective = config.objective
    return Padding(
        seq_length=config.data.seq_length,
        pairs=objective.sentence_pairs,
        short_share=objective.short_share,
        texts_read=objective.masks_per_text,
        vocab_size=config.model.vocab_size,
        eod_id=tokenizer.eod_id if tokenizer is not None else None,
    )
