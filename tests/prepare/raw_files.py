"""A small raw corpus of every format, with one of each kind that must not come out."""

import json
import random
from pathlib import Path

from tests.prepare.web_archives import PROSE, Page, article, compress, record

GERMAN = (
    "Das Komitee traf sich am ersten Montag des Monats in der alten Bibliothek, und der Schreiber las das Protokoll. "
    "Mehrere Mitglieder baten um mehr Zeit, weil die versprochenen Zahlen noch nicht da waren. "
) * 3
SHORT = "This text is certainly English, but too short to learn anything of it."
_WORDS = (PROSE + " River bridge winter market school garden letter window silver evening harbour mountain").split()


def prose(seed: int, words: int = 120) -> str:
    """A text of its own that passes the default filters."""
    random_ = random.Random(seed)
    sentences = []
    while words > 0:
        length = random_.randint(6, 14)
        sentences.append(" ".join(random_.choices(_WORDS, k=length)) + ".")
        words -= length
    return f"The number of this text is {seed}, and that of its words is not. " + " ".join(sentences)


def write_raw_files(folder: Path, documents: int = 40) -> list[Path]:
    """JSONL, text, html and WARC files.

    Of the first file's documents one is in German, one too short, one the same as another, and one is no JSON; of the
    archive's pages one was not found.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = [json.dumps({"text": prose(seed), "id": seed}) for seed in range(documents)]
    rows[3] = json.dumps({"text": GERMAN, "id": 3})
    rows[5] = json.dumps({"text": SHORT, "id": 5})
    rows[7] = rows[6]
    rows[9] = '{"text": "cut off'
    (folder / "a.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    (folder / "b.txt").write_text(prose(1001, 400) + " Mail me at jane.roe@example.org.\n", encoding="utf-8")
    (folder / "c.html").write_bytes(article(1, prose(1002, 300)))
    pages = [Page(f"http://example.org/{seed}", article(seed, prose(seed, 200))) for seed in range(2000, 2005)]
    pages.append(Page("http://example.org/gone", b"gone", status="404 Not Found"))
    (folder / "d.warc.gz").write_bytes(compress([record(page) for page in pages]))
    return [folder / name for name in ("a.jsonl", "b.txt", "c.html", "d.warc.gz")]
