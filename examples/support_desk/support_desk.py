#!/usr/bin/env python3
r"""Answer customers' questions from question-answer pairs, through a server's own endpoints; README.md has an example.

    cd examples/support_desk
    ./support_desk.py --embeddings http://127.0.0.1:8001 --chat http://127.0.0.1:8000 "How do I resume a run?"

The pairs nearest to the question are found by their vectors (/v1/embeddings) and by the words that they share with it.
If one fits well, its answer is given as it is stored; if some fit a little, a model answers from them
(/v1/chat/completions); if none does, the desk says that it doesn't know. Every answer names its source.
"""

import argparse
import json
import math
import os
import re
import sys
import urllib.error
import urllib.request
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

PAIRS = Path(__file__).parent / "questions.jsonl"
BATCH = 64
SHARE_OF_WORDS = 0.75
"""How much shared words weigh beside vectors. Small embedding models know few rare words, and fewer of Chinese."""
STOP_WORDS = frozenset(
    re.findall(
        r"[a-z]+|[\u3400-\u9fff]",
        """a an and are at be by can could do does for from have how i if in into is it its me my of on or should that
        the there this to use was what when where which who why with would you 的了吗么怎样什是在我你用和有""",
    )
)
UNKNOWN = {
    "en": "I don't know: none of the stored answers fits this question.",
    "zh": "我不知道：已有的答案都不符合这个问题。",
}
SYSTEM = {
    "en": "You answer customers' questions. Use only the notes below. Answer in one or two sentences. "
    "If the notes have no answer, say that you don't know.\n\nNotes:\n",
    "zh": "你回答客户的问题，只依据下面的资料，用一两句话回答。资料里没有答案时，请说不知道。\n\n资料：\n",
}


class DeskError(Exception):
    """What a user can fix, in a sentence."""


@dataclass(frozen=True)
class Pair:
    """A question with its answer, and where the answer is from."""

    id: str
    language: str
    question: str
    answer: str
    source: str


@dataclass(frozen=True)
class Match:
    """A pair, and how well it fits a question: about 0 for any other matter, 0.5 and more for the same one."""

    pair: Pair
    score: float


@dataclass(frozen=True)
class Reply:
    """What a customer is told.

    Attributes:
        text: The answer.
        kind: `stored`, `written` by the model, or `unknown`.
        sources: Where it is from, the best first.
    """

    text: str
    kind: str
    sources: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Endpoint:
    """A server, and the model of it that is asked; None is the server's first one."""

    address: str
    model: str | None = None
    key: str | None = None

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Send a request and return its result.

        Raises:
            DeskError: The server is away, or refuses.
        """
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        named = body if self.model is None else {**body, "model": self.model}
        try:
            request = urllib.request.Request(self.address.rstrip("/") + path, json.dumps(named).encode(), headers)
            with urllib.request.urlopen(request, timeout=300) as response:
                result: dict[str, Any] = json.load(response)
        except urllib.error.HTTPError as error:
            raise DeskError(
                f"{self.address}{path} answers {error.code}: {error.read(2000).decode(errors='replace')}"
            ) from None
        except (OSError, ValueError) as error:
            raise DeskError(
                f"{self.address}{path} cannot be asked: {error}; is `megatron-7b serve` running there?"
            ) from None
        return result

    def embed(self, texts: list[str]) -> np.ndarray:
        """Return the vectors of texts, of length 1: [texts, width]."""
        rows: list[list[float]] = []
        for at in range(0, len(texts), BATCH):
            data = self.post("/v1/embeddings", {"input": texts[at : at + BATCH]})["data"]
            rows += [one["embedding"] for one in sorted(data, key=lambda one: one["index"])]
        vectors = np.asarray(rows, np.float32)
        return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def language_of(text: str) -> str:
    """Return `zh` for a text with Chinese characters, else `en`."""
    return "zh" if re.search(r"[\u3400-\u9fff]", text) else "en"


def terms_of(text: str) -> list[str]:
    """Return the words of a text, cut after five letters; of Chinese the characters and their pairs."""
    terms: list[str] = []
    for word in re.findall(r"[a-z0-9]+|[\u3400-\u9fff]+", text.lower()):
        if language_of(word) == "zh":
            terms += [one for one in word if one not in STOP_WORDS]
            terms += [word[at : at + 2] for at in range(len(word) - 1)]
        elif word not in STOP_WORDS:
            terms.append(word[:5])
    return terms


class Desk:
    """Finds pairs and answers from them.

    Args:
        pairs: What is known.
        embeddings: Gives vectors; they are asked for here.
        chat: Writes answers; None gives stored ones only.
        sure: Scores from here on give the stored answer.
        unknown: Scores below it are no answer.
        top: Pairs that the model reads.
    """

    def __init__(
        self, pairs: list[Pair], embeddings: Endpoint, chat: Endpoint | None = None, *, sure: float = 0.45,
        unknown: float = 0.2, top: int = 3,
    ) -> None:  # fmt: skip
        self.pairs, self.embeddings, self.chat = pairs, embeddings, chat
        self.sure, self.unknown, self.top = sure, unknown, top
        self._vectors = [
            embeddings.embed([pair.question for pair in pairs]),
            embeddings.embed([f"{pair.question}\n{pair.answer}" for pair in pairs]),
        ]
        counts = [Counter(terms_of(f"{pair.question} {pair.answer}")) for pair in pairs]
        self._found_in = Counter(term for count in counts for term in count)
        self._weights = [self._weigh(count) for count in counts]

    def _weigh(self, counts: Counter[str]) -> dict[str, float]:
        """Return TF-IDF weights of terms, of length 1."""
        raw = {
            term: (1 + math.log(number)) * math.log(1 + len(self.pairs) / self._found_in.get(term, 0.5))
            for term, number in counts.items()
        }
        length = math.sqrt(sum(weight**2 for weight in raw.values())) or 1.0
        return {term: weight / length for term, weight in raw.items()}

    def find(self, question: str) -> list[Match]:
        """Return the pairs in the question's language, the nearest first."""
        (vector,) = self.embeddings.embed([question])
        mine = [number for number, pair in enumerate(self.pairs) if pair.language == language_of(question)]
        if not mine:
            return []
        cosines = np.mean([vectors[mine] @ vector for vectors in self._vectors], axis=0)
        cosines -= cosines.mean()  # some models find all texts of a language alike
        asked = self._weigh(Counter(terms_of(question)))
        matches = []
        for number, cosine in zip(mine, cosines, strict=True):
            shared = sum(weight * self._weights[number].get(term, 0.0) for term, weight in asked.items())
            matches.append(Match(self.pairs[number], float(cosine) + SHARE_OF_WORDS * shared))
        return sorted(matches, key=lambda match: -match.score)

    def answer(self, question: str) -> Reply:
        """Answer a question.

        Raises:
            DeskError: A server is away, or refuses.
        """
        matches = self.find(question)
        if not matches or matches[0].score < self.unknown:
            return Reply(UNKNOWN[language_of(question)], "unknown")
        best = matches[0]
        if best.score >= self.sure or self.chat is None:
            return Reply(best.pair.answer, "stored", [best.pair.source])
        used = [match.pair for match in matches[: self.top] if match.score >= self.unknown]
        notes = "\n".join(f"- {pair.question} {pair.answer}" for pair in used)
        messages = [
            {"role": "system", "content": SYSTEM[language_of(question)] + notes},
            {"role": "user", "content": question},
        ]
        body = {"messages": messages, "temperature": 0, "max_tokens": 120}
        text = self.chat.post("/v1/chat/completions", body)["choices"][0]["message"]["content"]
        return Reply(text.strip(), "written", list(dict.fromkeys(pair.source for pair in used)))


def read_lines(file: Path) -> list[dict[str, Any]]:
    """Return the records of a JSONL file.

    Raises:
        DeskError: It is missing, or a line is no JSON object.
    """
    records = []
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DeskError(f"{file} cannot be read: {error}") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            records.append({**record})
        except (ValueError, TypeError) as error:
            raise DeskError(f"{file}:{number}: expected a JSON object: {error}") from None
    return records


def read_pairs(file: Path) -> list[Pair]:
    """Return the pairs of a JSONL file with question, answer and source; id and language may be left out.

    Raises:
        DeskError: A line lacks one, or there is none.
    """
    pairs = []
    for number, record in enumerate(read_lines(file), start=1):
        if missing := [key for key in ("question", "answer", "source") if not isinstance(record.get(key), str)]:
            raise DeskError(f"record {number} of {file} has no {' and no '.join(missing)}, expected texts")
        question = record["question"]
        language = record.get("language", language_of(question))
        pairs.append(Pair(record.get("id", str(number)), language, question, record["answer"], record["source"]))
    if not pairs:
        raise DeskError(f"{file} has no pairs")
    return pairs


def evaluate(desk: Desk, asked: list[dict[str, Any]]) -> dict[str, Any]:
    """Measure how paraphrases find their pairs.

    Args:
        desk: With its pairs; no model is asked to write.
        asked: Records with `question` and `expected`: the id of its pair, or None for what the desk cannot know.
    """
    found: dict[str, Counter[str]] = {"en": Counter(), "zh": Counter()}
    for record in asked:
        matches, count = desk.find(record["question"]), found[language_of(record["question"])]
        score = matches[0].score if matches else 0.0
        ids = [match.pair.id for match in matches]
        if record["expected"] is None:
            count["unanswerable"] += 1
            count["unanswerable, said so"] += score < desk.unknown
            continue
        count["questions"] += 1
        count["recall@1"] += ids[:1] == [record["expected"]]
        count["recall@3"] += record["expected"] in ids[:3]
        if score >= desk.sure:
            count["stored answers"] += 1
            count["stored answers, right"] += ids[:1] == [record["expected"]]
        count["said unknown"] += score < desk.unknown
    return {language: dict(count) for language, count in found.items() if count}


def main(argv: list[str] | None = None) -> int:
    """Answer one question, those that are typed, or measure how well the desk finds answers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question", nargs="?", help="without one, questions are read from the terminal, a line each")
    parser.add_argument(
        "--pairs", type=Path, default=PAIRS, metavar="FILE", help="JSONL with question, answer and source"
    )
    parser.add_argument("--embeddings", required=True, metavar="URL", help="server that gives vectors")
    parser.add_argument("--embedding-model", metavar="NAME", help="of that server; its first one by default")
    parser.add_argument(
        "--chat", metavar="URL", help="server that writes answers; without one, stored answers are given"
    )
    parser.add_argument("--chat-model", metavar="NAME", help="of that server; its first one by default")
    parser.add_argument("--sure", type=float, default=0.45, help="scores from here on give the stored answer (0.45)")
    parser.add_argument("--unknown", type=float, default=0.2, help="scores below this are no answer (0.2)")
    parser.add_argument(
        "--evaluate", type=Path, metavar="FILE", help="JSONL with question and expected; prints figures"
    )
    parser.add_argument("--json", action="store_true", help="print replies as JSON lines")
    flags = parser.parse_args(argv)
    key = os.environ.get("MEGATRON_7B_API_KEY")
    try:
        chat = None if flags.chat is None else Endpoint(flags.chat, flags.chat_model, key)
        embeddings = Endpoint(flags.embeddings, flags.embedding_model, key)
        desk = Desk(read_pairs(flags.pairs), embeddings, chat, sure=flags.sure, unknown=flags.unknown)
        if flags.evaluate is not None:
            print(json.dumps(evaluate(desk, read_lines(flags.evaluate)), ensure_ascii=False, indent=1))
            return 0
        for question in [flags.question] if flags.question else typed():
            tell(desk.answer(question), as_json=flags.json)
    except DeskError as error:
        print(f"support_desk: {error}", file=sys.stderr)
        return 1
    return 0


def typed() -> Any:
    """Yield the questions that are typed, until the input ends."""
    while True:
        try:
            line = input("? " if sys.stdin.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt):
            return
        if line:
            yield line


def tell(reply: Reply, *, as_json: bool) -> None:
    """Print a reply with its sources."""
    if as_json:
        print(json.dumps({"text": reply.text, "kind": reply.kind, "sources": reply.sources}, ensure_ascii=False))
        return
    print(reply.text)
    if reply.sources:
        print(f"  [{', '.join(reply.sources)}]")


if __name__ == "__main__":
    raise SystemExit(main())
