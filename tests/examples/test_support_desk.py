"""The support desk: what it answers itself, what it has written, and when it says that it doesn't know."""

import json
import subprocess
import sys
import threading
import zlib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.support.assets import REPOSITORY

FOLDER = REPOSITORY / "examples" / "support_desk"
SCRIPT = FOLDER / "support_desk.py"
WIDTH = 512


@pytest.fixture(scope="module")
def desk_module() -> dict[str, Any]:
    """The script's names; its classes need a module of their own name."""
    import importlib.util

    spec = importlib.util.spec_from_file_location("support_desk", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["support_desk"] = module
    spec.loader.exec_module(module)
    return vars(module)


class Endpoints(BaseHTTPRequestHandler):
    """Vectors of words (a place for each, by its hash), and replies that repeat what was asked."""

    asked: list[dict[str, Any]]

    def log_message(self, *_: object) -> None:
        pass

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append({"path": self.path, "key": self.headers.get("Authorization"), **body})
        if self.path == "/v1/embeddings":
            rows = [{"index": index, "embedding": vector(text)} for index, text in enumerate(body["input"])]
            result: dict[str, Any] = {"data": rows[::-1]}  # the order is not promised
        else:
            result = {"choices": [{"message": {"role": "assistant", "content": " Written. "}}]}
        content = json.dumps(result).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def vector(text: str) -> list[float]:
    """Return the counts of a text's words, each at a place of its own."""
    row = [0.0] * WIDTH
    for word in text.lower().replace("?", " ").split():
        row[zlib.crc32(word.encode()) % WIDTH] += 1.0
    return row


@pytest.fixture
def server() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    handler = type("Handler", (Endpoints,), {"asked": []})
    one = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=one.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{one.server_address[1]}", handler.asked
    one.shutdown()
    one.server_close()


def run(*arguments: object, given: str | None = None, **environment: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, input=given, capture_output=True, text=True, env=environment)


def test_what_is_known_is_told_with_its_source(server: tuple[str, list[dict[str, Any]]]):
    address, asked = server
    done = run(
        "--embeddings",
        address,
        "--json",
        given="How do I resume a training run?\n怎样训练分词器？\n",
        MEGATRON_7B_API_KEY="k",
    )
    assert done.returncode == 0, done.stderr
    english, chinese = map(json.loads, done.stdout.splitlines())
    assert english["kind"] == chinese["kind"] == "stored"
    assert english["text"].startswith("Give the same command again.")
    assert english["sources"] == ["docs/user_guide.md#a-run"]
    assert "tokenizer train" in chinese["text"]
    assert {one["key"] for one in asked} == {"Bearer k"}


def test_what_is_nearly_known_is_written_from_notes(server: tuple[str, list[dict[str, Any]]]):
    address, asked = server
    flags = ("--embeddings", address, "--chat", address, "--chat-model", "small", "--sure", 2, "--json")
    done = run(*flags, "How do I resume a training run?")
    assert done.returncode == 0, done.stderr
    reply = json.loads(done.stdout)
    assert (reply["kind"], reply["text"]) == ("written", "Written.")
    assert reply["sources"][0] == "docs/user_guide.md#a-run"
    chat = asked[-1]
    assert (chat["path"], chat["model"], chat["temperature"]) == ("/v1/chat/completions", "small", 0)
    assert "Give the same command again." in chat["messages"][0]["content"]
    unknown = json.loads(run(*flags, "Zebras xylophone?").stdout)
    assert (unknown["kind"], unknown["sources"]) == ("unknown", [])


def test_figures_are_counted(server: tuple[str, list[dict[str, Any]]], tmp_path: Path):
    asked = tmp_path / "asked.jsonl"
    lines = [
        {"question": "How do I resume a training run?", "expected": "resume"},
        {"question": "How do I resume a training run?", "expected": "slurm"},
        {"question": "Zebras xylophone?", "expected": None},
    ]
    asked.write_text("\n".join(map(json.dumps, lines)))
    done = run("--embeddings", server[0], "--evaluate", asked)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["en"]
    assert (found["questions"], found["recall@1"], found["unanswerable, said so"]) == (2, 1, 1)


def test_mistakes_are_told_in_a_sentence(tmp_path: Path):
    away = run("--embeddings", "http://127.0.0.1:9", "x")
    assert (away.returncode, away.stdout) == (1, "")
    assert "is `megatron-7b serve` running there?" in away.stderr
    assert "cannot be asked: unknown url type" in run("--embeddings", "no address", "x").stderr
    pairs = tmp_path / "pairs.jsonl"
    for text, message in (
        ("", "has no pairs"),
        ("[1]", "pairs.jsonl:1: expected a JSON object"),
        ('{"answer": "a"}', "no question and no source"),
    ):
        pairs.write_text(text)
        done = run("--embeddings", "http://127.0.0.1:9", "--pairs", pairs, "x")
        assert done.returncode == 1
        assert message in done.stderr


def test_pairs_and_questions_fit_together(desk_module: dict[str, Any]):
    pairs = desk_module["read_pairs"](FOLDER / "questions.jsonl")
    ids = {pair.id for pair in pairs}
    assert len(ids) == len(pairs) > 50
    asked = desk_module["read_lines"](FOLDER / "paraphrases.jsonl")
    assert {one["expected"] for one in asked} - {None} <= ids
    assert {one["question"] for one in asked}.isdisjoint({pair.question for pair in pairs})
    for pair in pairs:
        page, _, section = pair.source.partition("#")
        if page == "docs/serving.md" and not (REPOSITORY / page).exists():
            continue
        text = (REPOSITORY / page).read_text()
        headings = {
            "-".join("".join(c for c in line.lstrip("# ").lower() if c.isalnum() or c in " -").split())
            for line in text.splitlines()
            if line.startswith("#")
        }
        assert not section or section in headings, pair.source
