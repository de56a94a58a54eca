"""Raw files with faults planted into real text, and what must become of each document.

Every document holds a word that is nowhere else (its mark), so that it is found again in whatever comes out,
without asking the program under test.
"""

import gzip
import json
import random
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from foreign_sentences import FOREIGN

PASSAGE_WORDS = 300
EDITED_WORDS = 0.02
FURNITURE = ("Imprint", "Subscribe to our newsletter", "All rights reserved")
"""Words of the menu, the form and the footer of every web page around its text."""
SKIP_LINK = "Skip to main content"
"""The first words of every web page."""

_MENU = ("Home", "Products", "Prices", "About us", "Careers", "Press", "Contact", "Imprint", "Login", "Help", "Search")


@dataclass
class Planted:
    """Documents of one kind by their marks, and what is to become of them."""

    kind: str
    marks: list[str] = field(default_factory=list)
    """One for each planted document; an exact copy has the mark of its original."""
    secrets: dict[str, str] = field(default_factory=dict)
    """By mark: what must not come out with the document."""


@dataclass
class Corpus:
    """Where the files are, and what is in them."""

    inputs: list[Path]
    evaluation: Path
    recipe: Path
    clean: Planted
    planted: list[Planted]
    unreadable: int
    """Records that are none."""
    pages: list[str]
    """Marks of the documents in web pages."""


class Marks:
    """Words that are nowhere else."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._used: set[str] = set()

    def put(self, text: str) -> tuple[str, str]:
        """A new mark, and the text with it in the middle."""
        while True:
            mark = "zq" + "".join(self._rng.choice("bdfghklmnprstvw") + self._rng.choice("aeiou") for _ in range(5))
            if mark not in self._used:
                break
        self._used.add(mark)
        middle = text.find(" ", len(text) // 2)
        return mark, f"{text[:middle]} {mark}{text[middle:]}"


class Builder:
    """Makes the corpus; the same seed and inputs give the same files.

    Args:
        speeches: JSONL of prose.
        plays: JSONL of plays.
        folder: Where the files go.
        scale: 1 plants some 1,500 documents into about 10,000.
    """

    def __init__(self, speeches: Path, plays: Path, folder: Path, scale: float) -> None:
        self._rng = random.Random(20_260_101)
        self._folder = folder
        self._scale = scale
        self._marks = Marks(self._rng)
        self._prose = self._share(cut_passages(speeches))
        self._verse = self._share(cut_passages(plays))

    def build(self) -> Corpus:
        """Write everything."""
        (self._folder / "html").mkdir(parents=True)
        speeches = [self._marks.put(text) for text in self._prose]
        plays = [self._marks.put(text) for text in self._verse]
        self._rng.shuffle(speeches)
        cut = [len(speeches) * share // 100 for share in (70, 85)]
        records, pages, crawl = speeches[: cut[0]], speeches[cut[0] : cut[1]], speeches[cut[1] :]
        clean = Planted("clean documents", [mark for mark, _ in [*speeches, *plays]])
        evaluation = self._write_evaluation()
        planted, more = self._plant(records, evaluation)
        copies = Planted("exact copies in the WARC file")
        again = self._rng.sample(crawl, self._count(60))
        copies.marks = [mark for mark, _ in again]
        inputs = [
            self._write_jsonl("speeches.jsonl", records, broken=True),
            self._write_parquet("plays.parquet", plays),
            self._write_pages(pages),
            self._write_warc("crawl.warc.gz", [*crawl, *again]),
            self._write_jsonl("planted.jsonl", more),
        ]
        in_pages = [mark for mark, _ in [*pages, *crawl]]
        recipe = self._write_recipe()
        file = self._folder / "evaluation.jsonl"
        return Corpus(inputs, file, recipe, clean, [*planted, copies], len(_BROKEN), in_pages)

    def _plant(
        self, records: Sequence[tuple[str, str]], evaluation: Sequence[str]
    ) -> tuple[list[Planted], list[tuple[str, str]]]:
        """All kinds but those that depend on the format, and their documents in random order."""
        exact = self._rng.sample(records, self._count(250))
        near = [
            self._marks.put(edit(text, EDITED_WORDS, self._rng))
            for _, text in self._rng.sample(records, self._count(400))
        ]
        foreign = [self._marks.put(text) for text in self._write_foreign(self._count(120))]
        furniture = [self._marks.put(text) for text in self._write_furniture(self._count(120))]
        hosts = self._rng.sample(self._prose, self._count(100) + self._count(150))
        leaks = [
            self._marks.put(insert(turn(text, self._rng), self._rng.choice(evaluation), self._rng))
            for text in hosts[: self._count(100)]
        ]
        personal = Planted("personal data, masked in place")
        letters = []
        for text in hosts[self._count(100) :]:
            secret, sentence = self._write_secret()
            mark, text = self._marks.put(insert(turn(text, self._rng), sentence, self._rng))
            personal.secrets[mark] = secret
            personal.marks.append(mark)
            letters.append((mark, text))
        kinds = {
            "exact copies": exact,
            f"near copies, {EDITED_WORDS:.0%} of words edited": near,
            "other languages": foreign,
            "boiler-plate": furniture,
            "text of an evaluation": leaks,
        }
        planted = [Planted(kind, [mark for mark, _ in documents]) for kind, documents in kinds.items()]
        mixed = [document for documents in kinds.values() for document in documents] + letters
        self._rng.shuffle(mixed)
        return [*planted, personal], mixed

    def _share(self, passages: list[str]) -> list[str]:
        step = max(1, round(1 / self._scale))
        return passages[::step]

    def _count(self, number: int) -> int:
        return max(5, round(number * self._scale))

    # ------------------------------------------------------------------------------------------------------- texts

    def _write_foreign(self, count: int) -> Iterator[str]:
        for number in range(count):
            sentences = list(FOREIGN.values())[number % len(FOREIGN)].split(". ")
            yield ". ".join(self._rng.choice(sentences).rstrip(".") for _ in range(14)) + "."

    def _write_furniture(self, count: int) -> Iterator[str]:
        """Menus, banners, lists of links, tables, hashtags, one line over and over."""
        for number in range(count):
            size = self._rng.randint(40, 80)
            words = [self._rng.choice(_MENU) for _ in range(size)]
            yield (
                "We use cookies to give you the best experience on our site. Accept all or read our policy.",
                "\n".join(f"- {word} and more of that" for word in words),
                "\n".join(f"{word} is what we are looking for ..." for word in words),
                " ".join(f"#{word.replace(' ', '')}" for word in words),
                "\n".join(f"{self._rng.random() * 1000:.2f} {self._rng.randint(1, 99)} of 12" for _ in words),
                "\n".join(["Click here to go to the next page of the archive."] * size),
            )[number % 6]

    def _write_secret(self) -> tuple[str, str]:
        """Something personal, and a sentence with it."""
        rng = self._rng
        name = "".join(rng.choice("abcdefghijklmnoprstuvw") for _ in range(8))
        kind = rng.randrange(4)
        if kind == 0:
            secret = f"{name}.smith@mail.{name[:4]}.org"
            return secret, f"Write to {secret} before the end of the month."
        if kind == 1:
            secret = f"{rng.randint(11, 99)}.{rng.randint(100, 250)}.{rng.randint(1, 250)}.{rng.randint(1, 250)}"
            return secret, f"The request came from {secret} late in the evening."
        if kind == 2:
            secret = make_iban(rng)
            return secret, f"Please send the amount to {secret} within two weeks."
        secret = make_card_number(rng)
        return secret, f"The card {secret} was charged with the whole sum."

    # ------------------------------------------------------------------------------------------------------- files

    def _write_evaluation(self) -> list[str]:
        """Questions that nobody has asked before, of words that people use."""
        words = [word for text in self._prose[:200] for word in text.split()]
        questions = [" ".join(self._rng.choice(words) for _ in range(25)) for _ in range(60)]
        lines = (json.dumps({"question": text, "answer": "B"}) + "\n" for text in questions)
        (self._folder / "evaluation.jsonl").write_text("".join(lines), encoding="utf-8")
        return questions

    def _write_jsonl(self, name: str, documents: Sequence[tuple[str, str]], *, broken: bool = False) -> Path:
        lines = [json.dumps({"text": text}, ensure_ascii=False).encode() for _, text in documents]
        if broken:
            for line in _BROKEN:
                lines.insert(self._rng.randrange(len(lines)), line)
        file = self._folder / name
        file.write_bytes(b"".join(line + b"\n" for line in lines))
        return file

    def _write_parquet(self, name: str, documents: Sequence[tuple[str, str]]) -> Path:
        file = self._folder / name
        pq.write_table(pa.table({"text": [text for _, text in documents]}), file, row_group_size=500)
        return file

    def _write_pages(self, documents: Sequence[tuple[str, str]]) -> Path:
        for number, (_, text) in enumerate(documents):
            (self._folder / "html" / f"page{number:05}.html").write_text(make_page(text), encoding="utf-8")
        return self._folder / "html"

    def _write_warc(self, name: str, documents: Sequence[tuple[str, str]]) -> Path:
        file = self._folder / name
        with file.open("wb") as stream:
            for number, (_, text) in enumerate(documents):
                page = make_page(text).encode()
                http = b"HTTP/1.1 200 OK\r\nContent-Type: text/html; charset=utf-8\r\n"
                body = http + b"Content-Length: %d\r\n\r\n" % len(page) + page
                head = (
                    "WARC/1.0\r\nWARC-Type: response\r\nWARC-Date: 2026-01-01T00:00:00Z\r\n"
                    f"WARC-Record-ID: <urn:uuid:00000000-0000-0000-0000-{number:012}>\r\n"
                    f"WARC-Target-URI: https://example.org/{number}\r\n"
                    f"Content-Type: application/http; msgtype=response\r\nContent-Length: {len(body)}\r\n\r\n"
                )
                stream.write(gzip.compress(head.encode() + body + b"\r\n\r\n", mtime=0))
        return file

    def _write_recipe(self) -> Path:
        """What a user would write for such a corpus: English, FineWeb's rules for all but the plays."""
        file = self._folder / "recipe.yaml"
        evaluation = self._folder / "evaluation.jsonl"
        file.write_text(
            f"language:\n  languages: [en]\nquality:\n  fineweb: {{}}\nduplicates:\n  near: true\n"
            f'decontamination:\n  files: ["{evaluation}"]\nsplit:\n  validation: 0.01\n  test: 0.01\n'
            'per_source:\n  - files: "*plays*"\n    quality: {fineweb: none, gopher_repetition: none}\n',
            encoding="utf-8",
        )
        return file


_BROKEN = (
    b'{"text": "never closed',
    b'{"text": "\xff\xfe not UTF-8"}',
    b'{"title": "a record without text"}',
    b'{"text": 12}',
    b"plain words where an object should be",
)


def cut_passages(file: Path) -> list[str]:
    """Paragraphs of the records, gathered to a few hundred words each; without what the books themselves repeat."""
    passages = []
    seen: set[int] = set()
    for line in file.read_text(encoding="utf-8").splitlines():
        gathered: list[str] = []
        words = 0
        for paragraph in re.split(r"\n\s*\n", json.loads(line)["text"]):
            gathered.append(paragraph.strip("\n"))
            words += len(paragraph.split())
            if words >= PASSAGE_WORDS:
                passage = "\n\n".join(gathered)
                runs = _sample_runs(passage)
                if len(runs & seen) <= 0.1 * len(runs):
                    passages.append(passage)
                seen |= runs
                gathered, words = [], 0
    return passages


def _sample_runs(text: str) -> set[int]:
    """Checksums of one in four of the runs of six words: of the same ones, wherever they are."""
    words = re.findall(r"\w+", text.lower())
    sums = (zlib.crc32(" ".join(words[start : start + 6]).encode()) for start in range(len(words) - 5))
    return {value for value in sums if value % 4 == 0}


def edit(text: str, share: float, rng: random.Random) -> str:
    """The text with about a share of its words replaced by others of it; line ends stay."""
    words = text.split()
    return re.sub(r"\S+", lambda match: rng.choice(words) if rng.random() < share else match.group(), text)


def turn(text: str, rng: random.Random) -> str:
    """The words of a text in another order, some in a row: prose that repeats no other document."""
    words = text.split()
    pieces = [words[start : start + 2] for start in range(0, len(words), 2)]
    rng.shuffle(pieces)
    sentences = [
        " ".join(word for piece in pieces[start : start + 6] for word in piece) for start in range(0, len(pieces), 6)
    ]
    return ". ".join(sentences) + "."


def insert(text: str, sentence: str, rng: random.Random) -> str:
    """The text with a sentence between two of its words."""
    place = text.find(" ", rng.randrange(len(text) * 3 // 4))
    return f"{text[:place]} {sentence}{text[place:]}"


def make_page(text: str) -> str:
    """A web page around a text."""
    paragraphs = "\n".join(f"<p>{_escape(paragraph)}</p>" for paragraph in text.split("\n\n"))
    links = "".join(f'<li><a href="/{name.replace(" ", "-").lower()}">{name}</a></li>' for name in _MENU)
    _, newsletter, rights = FURNITURE
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>A speech</title>'
        f'<style>p {{ margin: 0 }}</style><script>var tracking = "on";</script></head>'
        f'<body><a href="#main">{SKIP_LINK}</a><nav><ul>{links}</ul></nav>'
        f'<main id="main"><article><h1>A speech</h1>\n{paragraphs}\n</article></main>'
        f'<aside class="sidebar"><form>{newsletter}<input type="email"></form></aside>'
        f"<footer><ul>{links}</ul>{rights}</footer></body></html>"
    )


def make_iban(rng: random.Random) -> str:
    """A German IBAN whose checksum is right."""
    account = "".join(str(rng.randrange(10)) for _ in range(18))
    check = 98 - int(f"{account}131400") % 97  # D is 13, E is 14
    return f"DE{check:02}{account}"


def make_card_number(rng: random.Random) -> str:
    """A card number whose Luhn checksum is right, in groups of four."""
    digits = [4, *(rng.randrange(10) for _ in range(14))]
    doubled = [digit * 2 - 9 * (digit > 4) if place % 2 == 0 else digit for place, digit in enumerate(digits)]
    number = "".join(map(str, [*digits, -sum(doubled) % 10]))
    return " ".join(number[start : start + 4] for start in range(0, 16, 4))


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")
