"""A server whose replies a test dictates: hostile texts, errors, streams that break off. It serves the real page.

What the page does with a real model is tested with the real server; no model writes these replies on demand.
"""

import json
import socket
import threading
import time
from collections import deque
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self

import megatron_7b.serving

PAGE = Path(megatron_7b.serving.__file__).parent / "page"
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
TYPES = {".html": "text/html; charset=utf-8", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}


class ScriptedServer:
    """Serves the page, and replies from `script`: a text, a list of pieces, an error, or what is done with a handler.

    A piece is a text, or a number of seconds to wait; `CUT` breaks the connection off. The last entry stays.
    """

    CUT = object()

    def __init__(self, *script: Any, key: str | None = None) -> None:
        self.script: deque[Any] = deque(script)
        self.key = key
        self.models = [{"id": "tiny", "object": "model"}]
        self.asked: list[dict[str, Any]] = []
        self.left = threading.Event()
        self._server: ThreadingHTTPServer | None = None
        self.port = 0

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def address(self) -> str:
        """Of the page."""
        return f"http://127.0.0.1:{self.port}/"

    def start(self) -> None:
        """Listen, at the port of before if there was one."""
        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), handler_of(self))
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        """Stop listening."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def next_reply(self) -> Any:
        """Return the next entry of the script."""
        return self.script.popleft() if len(self.script) > 1 else self.script[0]


def error(status: int, message: str, code: str | None = None, **headers: str) -> dict[str, Any]:
    """Return an entry of a script: an error in OpenAI's shape."""
    return {"status": status, "headers": headers, "body": {"error": {"message": message, "type": "e", "code": code}}}


def handler_of(server: ScriptedServer) -> type["Handler"]:
    """Return the class that answers for a server."""
    return type("ServersHandler", (Handler,), {"scripted": server})


class Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    scripted: ScriptedServer

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        if path == "/health":
            self.send_json({"status": "ok"})
        elif path == "/v1/models":
            if not self.is_refused():
                self.send_json({"object": "list", "data": self.scripted.models})
        else:
            self.send_file(PAGE / ("index.html" if path == "/" else path.removeprefix("/static/")))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.is_refused():
            return
        self.scripted.asked.append(body)
        reply = self.scripted.next_reply()
        if isinstance(reply, dict):
            self.send_json(reply["body"], reply["status"], reply["headers"])
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        try:
            self.stream([reply] if isinstance(reply, str) else reply)
        except OSError:
            self.scripted.left.set()

    def is_refused(self) -> bool:
        key = self.scripted.key
        if key is None or self.headers.get("Authorization") == f"Bearer {key}":
            return False
        self.send_json(error(401, "a key is needed", "invalid_api_key")["body"], 401)
        return True

    def send_file(self, file: Path) -> None:
        if not file.is_file():
            self.send_json({"error": {"message": "not found"}}, 404)
            return
        headers = {"Content-Security-Policy": POLICY, "Cache-Control": "no-store"}
        self.send(200, file.read_bytes(), TYPES[file.suffix], headers)

    def send_json(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send(status, json.dumps(value).encode(), "application/json", headers or {})

    def send(self, status: int, content: bytes, kind: str, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def stream(self, pieces: list[Any]) -> None:
        count = 0
        for piece in pieces:
            if piece is ScriptedServer.CUT:
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            if isinstance(piece, (int, float)):
                time.sleep(piece)
            elif isinstance(piece, dict):
                self.send_event(piece)
            else:
                count += 1
                self.send_event({"choices": [{"index": 0, "delta": {"content": piece}, "finish_reason": None}]})
        self.send_event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
        self.send_event({"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": count}})
        self.send_event(b"[DONE]")

    def send_event(self, value: Any) -> None:
        self.wfile.write(b"data: " + (value if isinstance(value, bytes) else json.dumps(value).encode()) + b"\n\n")
        self.wfile.flush()
