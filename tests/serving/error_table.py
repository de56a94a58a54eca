"""Requests that are refused, and the table of docs/serving.md that says how.

`python -m tests.serving.error_table CHECKPOINT` writes it anew. The checkpoint is a tiny one; what depends on it (its
name, its context) is in the table as it is.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tests.support.assets import REPOSITORY
from tests.support.serving import Server, running_server

PAGE = REPOSITORY / "docs" / "serving.md"
BEGIN, END = "<!-- errors: written by tests/serving/error_table.py -->\n", "<!-- end of errors -->"
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


class Case(NamedTuple):
    """A request that is refused."""

    what: str
    path: str
    body: Any = None
    method: str | None = None
    headers: dict[str, str] | None = None


def schema(content: Any) -> Any:
    """Return a format of JSON."""
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": content}}


CASES = [
    Case("`{`", COMPLETIONS, b"{"),
    Case("no body", COMPLETIONS, b""),
    Case("`NaN`", COMPLETIONS, b'{"prompt": "a", "temperature": NaN}'),
    Case("half a character", COMPLETIONS, b'{"prompt": "\\ud800"}'),
    Case("a list", COMPLETIONS, b"[]"),
    Case("another Content-Type", COMPLETIONS, b"prompt=a", headers={"Content-Type": "text/plain"}),
    Case("5 MiB", COMPLETIONS, b'{"prompt": "' + b"a" * (5 << 20) + b'"}'),
    Case("`GET`", COMPLETIONS),
    Case("an unknown path", "/v1/nothing"),
    Case("a page of another site", "/v1/models", headers={"Origin": "https://example.com"}),
    Case("a name that leads here", "/v1/models", headers={"Host": "example.com"}),
    Case("no prompt", COMPLETIONS, {}),
    Case('`"prompt": 5`', COMPLETIONS, {"prompt": 5}),
    Case('`"prompt": null`', COMPLETIONS, {"prompt": None}),
    Case('`"prompt": []`', COMPLETIONS, {"prompt": []}),
    Case('`"prompt": [9999]`', COMPLETIONS, {"prompt": [9999]}),
    Case('`"prompt": [true]`', COMPLETIONS, {"prompt": [True]}),
    Case("an unknown model", COMPLETIONS, {"prompt": "a", "model": "gpt"}),
    Case("a misspelled field", COMPLETIONS, {"prompt": "a", "temprature": 1}),
    Case('`"temperature": -1`', COMPLETIONS, {"prompt": "a", "temperature": -1}),
    Case('`"temperature": "1"`', COMPLETIONS, {"prompt": "a", "temperature": "1"}),
    Case('`"top_p": 0`', COMPLETIONS, {"prompt": "a", "top_p": 0}),
    Case('`"max_tokens": 0`', COMPLETIONS, {"prompt": "a", "max_tokens": 0}),
    Case("more `min_tokens` than `max_tokens`", COMPLETIONS, {"prompt": "a", "min_tokens": 5, "max_tokens": 4}),
    Case('`"repetition_penalty": 1e-300`', COMPLETIONS, {"prompt": "a", "repetition_penalty": 1e-300}),
    Case("a bias of what is no token", COMPLETIONS, {"prompt": "a", "logit_bias": {"9" * 5000: 1}}),
    Case('`"n": 100`', COMPLETIONS, {"prompt": "a", "n": 100}),
    Case("`n` above the batch", COMPLETIONS, {"prompt": "a", "n": 40}),
    Case('`"stop": [""]`', COMPLETIONS, {"prompt": "a", "stop": [""]}),
    Case("more than the context", COMPLETIONS, {"prompt": "the cat " * 200}),
    Case("too many new tokens", COMPLETIONS, {"prompt": "a", "max_tokens": 1000}),
    Case("`suffix`", COMPLETIONS, {"prompt": "a", "suffix": "b"}),
    Case("a schema of 600 kB", COMPLETIONS, {"prompt": "a", "response_format": schema({"enum": ["a" * 600_000]})}),
    Case("a schema that is none", COMPLETIONS, {"prompt": "a", "response_format": schema({"type": "nothing"})}),
    Case("a schema that nothing fits", COMPLETIONS, {"prompt": "a", "response_format": schema({"$ref": "#"})}),
    Case("options without a stream", COMPLETIONS, {"prompt": "a", "stream_options": {"include_usage": True}}),
    Case("no messages", CHAT, {"messages": []}),
    Case("a message without role", CHAT, {"messages": [{"content": "a"}]}),
    Case("an image", CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}),
    Case("tools", CHAT, {"messages": [{"role": "user", "content": "a"}], "tools": [{"type": "function"}]}),
    Case("vectors of a model that writes", "/v1/embeddings", {"input": "a"}),
]


def rows(server: Server) -> Iterator[str]:
    """Yield the table's rows, as a server answers."""
    yield "| request | to | status | `code` | message |"
    yield "|---|---|---|---|---|"
    for case in CASES:
        status, content = server.ask(case.path, case.body, method=case.method, headers=case.headers)
        error = content["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert 400 <= status < 500
        message = error["message"].replace("|", "\\|").replace("<", "&lt;")
        code = f"`{error['code']}`" if error["code"] else ""
        yield f"| {case.what} | `{case.path.removeprefix('/v1')}` | {status} | {code} | {message} |"


def written() -> str:
    """Return the table of the page."""
    return PAGE.read_text().partition(BEGIN)[2].partition(END)[0]


def main(checkpoint: Path) -> None:
    """Write the table anew."""
    with running_server("--checkpoint", checkpoint) as server:
        table = "\n".join(rows(server)) + "\n"
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(before + BEGIN + table + END + rest.partition(END)[2])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
