"""What each head makes of records: sequences for the model, and predictions of its outputs. Needs no torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from megatron_7b.config import RunConfig
from megatron_7b.config.schema import ModelConfig
from megatron_7b.data.labelled import questions, tags, texts
from megatron_7b.data.labelled.frames import find_frame
from megatron_7b.data.records.reading import text_of
from megatron_7b.errors import ConfigError
from megatron_7b.tokenizer import Tokenizer

type Record = Mapping[str, Any]
type Outputs = NDArray[np.float32]

_MOST_ANSWER_TOKENS = 30
_BORDERS_TRIED = 20
"""Most promising first and last tokens that are combined to answers, as SQuAD's usual evaluation has it."""


@dataclass(frozen=True)
class ModelInput:
    """One sequence for the model.

    Attributes:
        ids: int64 [n].
        token_values: What the objective is told of each token, [n]: which are of the second text, or classified.
    """

    ids: NDArray[np.int64]
    token_values: NDArray[np.floating]


class PredictedTask(Protocol):
    """Between records and a model with a head."""

    def sequences(self, record: Record) -> list[ModelInput]:
        """Return what the model reads of a record.

        Raises:
            RecordError: It cannot be used.
        """

    def prediction(self, record: Record, outputs: Sequence[Outputs]) -> dict[str, Any]:
        """Return what is predicted for a record, given the head's outputs for each of its sequences."""


def build_task(config: RunConfig, tokenizer: Tokenizer) -> PredictedTask:
    """Return the task of a model with a head.

    Raises:
        ConfigError: The model has no head.
    """
    model, length = config.model, config.data.seq_length
    frame = find_frame(tokenizer, is_encoder=model.traits.kind == "encoder")
    match model.head:
        case "sequence_classification":
            return TextLabels(texts.TextEncoder(tokenizer, frame, length), model)
        case "token_classification":
            return WordTags(tags.TagEncoder(tokenizer, frame, length), model, config.finetune.tag_scheme)
        case "question_answering":
            encoder = questions.QuestionEncoder(tokenizer, frame, length, config.finetune.doc_stride)
            return Answers(encoder, may_lack=config.finetune.may_lack_answer)
        case _:
            raise ConfigError(
                "the checkpoint has no head that classifies or answers: it predicts tokens",
                hint="`megatron-7b generate` continues texts; `megatron-7b finetune` with a task such as "
                "text_classification trains a head",
            )


def names_of_labels(model: ModelConfig) -> tuple[str, ...]:
    """Return the names of a head's outputs, as transformers calls those without a name."""
    return model.labels or tuple(f"LABEL_{number}" for number in range(model.num_labels))


@dataclass
class TextLabels:
    """Classes of texts, or numbers."""

    encoder: texts.TextEncoder
    model: ModelConfig

    def sequences(self, record: Record) -> list[ModelInput]:
        """Return the text, or the pair."""
        framed = self.encoder.framed(dict(record))
        return [ModelInput(framed.ids, framed.is_second.astype(np.float32))]

    def prediction(self, record: Record, outputs: Sequence[Outputs]) -> dict[str, Any]:  # noqa: ARG002
        """Return the label with its probability and those of all; labels above one half; or the number."""
        (logits,) = outputs[0]
        names = names_of_labels(self.model)
        if self.model.problem_type == "regression":
            numbers = [round(float(number), 6) for number in logits]
            return {"value": numbers[0] if len(numbers) == 1 else numbers}
        if self.model.problem_type == "multi_label_classification":
            shares = 1 / (1 + np.exp(-logits.astype(np.float64)))
            scores = _scores(names, shares)
            return {
                "labels": [name for name, share in zip(names, shares, strict=True) if share > 0.5],
                "scores": scores,
            }
        shares = _softmax(logits)
        best = int(shares.argmax())
        return {"label": names[best], "score": round(float(shares[best]), 6), "scores": _scores(names, shares)}


@dataclass
class WordTags:
    """Tags of words."""

    encoder: tags.TagEncoder
    model: ModelConfig
    scheme: tags.Scheme

    def sequences(self, record: Record) -> list[ModelInput]:
        """Return the text in its pieces; the first token of each word is classified."""
        found = []
        for piece in self.encoder.pieces(tags.words_of(dict(record))):
            values = np.zeros(len(piece.ids), np.float32)
            values[piece.places[piece.places >= 0]] = 1.0
            found.append(ModelInput(piece.ids, values))
        return found

    def prediction(self, record: Record, outputs: Sequence[Outputs]) -> dict[str, Any]:
        """Return a tag for each word, and with BIO tags the names that they mark."""
        names, words = names_of_labels(self.model), tags.words_of(dict(record))
        outside = tags.OUTSIDE if tags.OUTSIDE in names else names[0]
        found: list[str] = []
        for piece, logits in zip(self.encoder.pieces(words), outputs, strict=True):
            classes = iter(logits.argmax(axis=1).tolist())
            found += [names[next(classes)] if place >= 0 else outside for place in piece.places]
        if self.scheme == "plain":
            return {"tags": found}
        return {"tags": found, "entities": tags.entities_of(words, found)}


@dataclass
class Answers:
    """Spans of texts."""

    encoder: questions.QuestionEncoder
    may_lack: bool

    def sequences(self, record: Record) -> list[ModelInput]:
        """Return the question with each window of its text."""
        return [ModelInput(one.ids, one.is_text.astype(np.float32)) for one in self._windows(record)]

    def prediction(self, record: Record, outputs: Sequence[Outputs]) -> dict[str, Any]:
        """Return the most probable answer, where it is in the text, and its probability among those considered."""
        context = text_of(dict(record), "context")
        candidates = [
            found
            for window, logits in zip(self._windows(record), outputs, strict=True)
            for found in _candidates(window, logits)
        ]
        candidates.sort(reverse=True)
        considered = [score for score, _, _ in candidates[:_BORDERS_TRIED]]
        none = min(float(logits[0].sum()) for logits in outputs)
        if self.may_lack:
            considered.append(none)
        shares = _softmax(np.array(considered))
        best, start, stop = candidates[0]
        lack = {"no_answer_score": round(float(shares[-1]), 6)} if self.may_lack else {}
        if self.may_lack and none > best:
            return {"answer": "", "start": None, "end": None, "score": lack["no_answer_score"], **lack}
        return {"answer": context[start:stop], "start": start, "end": stop, "score": round(float(shares[0]), 6), **lack}

    def _windows(self, record: Record) -> list[questions.Window]:
        given = dict(record)
        return self.encoder.windows(text_of(given, "question"), text_of(given, "context"))


def _candidates(window: questions.Window, logits: Outputs) -> list[tuple[float, int, int]]:
    """Return the best spans of a window: score, first character, and one past the last."""
    of_text = logits[window.begin : window.begin + len(window.spans)]
    starts, ends = (np.argsort(-of_text[:, column], kind="stable")[:_BORDERS_TRIED] for column in (0, 1))
    return [
        (float(of_text[start, 0] + of_text[end, 1]), int(window.spans[start, 0]), int(window.spans[end, 1]))
        for start in starts.tolist()
        for end in ends.tolist()
        if start <= end < start + _MOST_ANSWER_TOKENS
    ] or [(float(of_text[:, 0].max() + of_text[:, 1].min()), *_one_token(window, of_text))]


def _one_token(window: questions.Window, of_text: Outputs) -> tuple[int, int]:
    start = int(of_text[:, 0].argmax())
    return cast("tuple[int, int]", tuple(window.spans[start].tolist()))


def _softmax(logits: NDArray[np.floating]) -> NDArray[np.float64]:
    shifted = np.exp(logits.astype(np.float64) - logits.max())
    return cast("NDArray[np.float64]", shifted / shifted.sum())


def _scores(names: Sequence[str], shares: NDArray[np.floating]) -> dict[str, float]:
    return {name: round(float(share), 6) for name, share in zip(names, shares, strict=True)}
