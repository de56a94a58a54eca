#!/usr/bin/env python3
r"""Answer questions from documents of one's own: find passages that fit, then have a model mark the answer in them.

    megatron-7b finetune --config classify_tiny_cpu --finetune.task question_answering --run-dir answers \
        --checkpoint.initialize-from minilm --data.train squad.jsonl
    examples/applications/domain_qa.py --checkpoint answers --documents manuals.jsonl --question "How is it cleaned?"

A document is a line {"text": "…"}, perhaps with "title"; its passages are its paragraphs. Passages are found by the
words that they share with the question (TF-IDF), in Chinese and Japanese by pairs of characters. The answer is the one
for which fit and the model's certainty together are highest; its passage and document are told, so that it can be
checked.
"""

import argparse
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FEWEST_CHARACTERS = 20
_TOKEN = r"[\u3400-\u9fff\u3040-\u30ff]|[^\W\u3400-\u9fff\u3040-\u30ff]+"


@dataclass(frozen=True)
class Passage:
    """A paragraph of a document."""

    text: str
    document: int
    title: str


def read_passages(file: Path) -> list[Passage]:
    """Return the paragraphs of all documents of a JSONL file."""
    passages = []
    for number, line in enumerate(file.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            text, title = str(record["text"]), str(record.get("title", ""))
        except (ValueError, KeyError, AttributeError) as error:
            raise SystemExit(f"{file}:{number}: expected a JSON object with a text: {error!r}") from None
        parts = [part.strip() for part in re.split(r"\n\s*\n", text)]
        passages += [Passage(part, number, title) for part in parts if len(part) >= FEWEST_CHARACTERS]
    if not passages:
        raise SystemExit(f"{file} has no paragraph of at least {FEWEST_CHARACTERS} characters")
    return passages


def find_passages(question: str, passages: list[Passage], top: int) -> list[tuple[Passage, float]]:
    """Return the passages that share the most telling words with a question, with how well each fits, from 0 to 1."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(token_pattern=_TOKEN, ngram_range=(1, 2), sublinear_tf=True)
    matrix = vectorizer.fit_transform([f"{passage.title}\n{passage.text}" for passage in passages])
    fits = (matrix @ vectorizer.transform([question]).T).toarray().ravel()
    best = sorted(range(len(passages)), key=lambda number: -fits[number])[:top]
    return [(passages[number], float(fits[number])) for number in best if fits[number] > 0]


def answer(checkpoint: Path, questions: list[str], passages: list[Passage], top: int) -> list[dict[str, Any]]:
    """Return for each question the best answer with its source; an empty one if no passage has it."""
    from megatron_7b.prediction import predict

    found = [find_passages(question, passages, top) for question in questions]
    asked = [
        {"question": question, "context": passage.text}
        for question, candidates in zip(questions, found, strict=True)
        for passage, _ in candidates
    ]
    predictions = iter(predict(checkpoint, asked) if asked else [])
    answers = []
    for question, candidates in zip(questions, found, strict=True):
        tried = [(passage, fit, next(predictions)) for passage, fit in candidates]
        known = [one for one in tried if one[2]["answer"]]
        if not known:
            answers.append({"question": question, "answer": "", "score": 0.0})
            continue
        passage, fit, said = max(known, key=lambda one: one[1] * one[2]["score"])
        answers.append(
            {
                "question": question, "answer": said["answer"], "score": said["score"], "fit": round(fit, 4),
                "title": passage.title, "document": passage.document, "passage": passage.text,
                "start": said["start"], "end": said["end"],
            }
        )  # fmt: skip
    return answers


def main(argv: list[str] | None = None) -> int:
    """Answer questions from the command line or from a file, a JSON line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="of a run with task question_answering")
    parser.add_argument("--documents", type=Path, required=True, metavar="FILE", help="JSON lines with a text each")
    parser.add_argument("--question", action="append", default=[], help="may be given several times")
    parser.add_argument("--questions", type=Path, metavar="FILE", help="a question a line")
    parser.add_argument("--top", type=int, default=5, help="passages that are read for a question")
    flags = parser.parse_args(argv)
    asked = list(flags.question)
    if flags.questions is not None:
        asked += [line.strip() for line in flags.questions.read_text(encoding="utf-8").split("\n") if line.strip()]
    if not asked:
        parser.error("give --question or --questions")
    for one in answer(flags.checkpoint, asked, read_passages(flags.documents), flags.top):
        print(json.dumps(one, ensure_ascii=False))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
