"""A small server that speaks the OpenAI chat protocol over real HTTP, and can be told to misbehave."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

type Reply = tuple[int, dict[str, Any]]


def say(text: str, finish_reason: str = "stop") -> Reply:
    """An answer as OpenAI's servers give it."""
    message = {"role": "assistant", "content": text}
    choices = [{"index": 0, "message": message, "finish_reason": finish_reason}]
    return 200, {"id": "1", "object": "chat.completion", "model": "m", "choices": choices}


@dataclass
class ChatServer:
    """What was asked, and how it is answered."""

    answer: Callable[[str], Reply]
    url: str = ""
    key: str | None = None
    seconds: float = 0.0
    requests: list[dict[str, Any]] = field(default_factory=list)
    most_at_once: int = 0
    _now: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def prompts(self) -> list[str]:
        """What was asked, in the order of arrival."""
        return [request["messages"][-1]["content"] for request in self.requests]

    def take(self, path: str, headers: Any, body: bytes) -> Reply:
        """Handle one request."""
        if self.key is not None and headers.get("Authorization") != f"Bearer {self.key}":
            return 401, {"error": {"message": "wrong key"}}
        if path == "/v1/models":
            return 200, {"data": [{"id": "m"}]}
        if path != "/v1/chat/completions":
            return 404, {"error": {"message": "no such path"}}
        request = json.loads(body)
        if request["model"] != "m":
            return 404, {"error": {"message": "no such model"}}
        with self._lock:
            self.requests.append(request)
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
        time.sleep(self.seconds)
        try:
            return self.answer(request["messages"][-1]["content"])
        finally:
            with self._lock:
                self._now -= 1


@contextmanager
def serve(answer: Callable[[str], Reply], **settings: Any) -> Iterator[ChatServer]:
    """Run a server in threads of this process for the duration of a with block."""
    chat = ChatServer(answer, **settings)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._reply(b"")

        def do_POST(self) -> None:
            self._reply(self.rfile.read(int(self.headers["Content-Length"])))

        def _reply(self, body: bytes) -> None:
            status, answer = chat.take(self.path, self.headers, body)
            data = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            if status == 429:
                self.send_header("Retry-After", "0")
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    chat.url = f"http://127.0.0.1:{server.server_port}/v1"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield chat
    finally:
        server.shutdown()
        server.server_close()
