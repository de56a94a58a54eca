"""A server as users start it, for the duration of a with block."""

import contextlib
import json
import os
import re
import signal
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.assets import REPOSITORY
from tests.support.commands import start_command


@dataclass
class Server:
    """A server that runs."""

    address: str
    process: Any
    err: Path

    def stop(self, timeout: float = 20.0) -> int:
        """Ask it to stop, and return its exit code."""
        os.kill(self.process.pid, signal.SIGTERM)
        self.process.join(timeout)
        return int(self.process.exitcode)

    def ask(
        self, path: str, content: Any = None, *, method: str | None = None, headers: dict[str, str] | None = None
    ) -> tuple[int, Any]:
        """Send a request; returns the status, and what JSON or text came."""
        data = content if isinstance(content, bytes) or content is None else json.dumps(content).encode()
        given = {"Content-Type": "application/json", **(headers or {})}
        request = urllib.request.Request(self.address + path, data, given, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as reply:
                return reply.status, _read(reply.read())
        except urllib.error.HTTPError as error:
            return error.code, _read(error.read())

    def metric(self, name: str) -> float:
        """Return a figure of /metrics."""
        found = re.search(rf"^megatron_7b_{name} (\S+)$", self.ask("/metrics")[1], re.MULTILINE)
        assert found is not None
        return float(found[1])


def _read(body: bytes) -> Any:
    try:
        return json.loads(body)
    except ValueError:
        return body.decode()


@contextlib.contextmanager
def running_server(*arguments: object) -> Iterator[Server]:
    """Start `megatron-7b serve` at a free port, and end it."""
    environment = {name: value for name, value in os.environ.items() if name != "RANK"}
    words = ["serve", "--port", "0", "--runtime.num-threads", "1", *map(str, arguments)]
    with tempfile.TemporaryDirectory() as name:
        out, err = Path(name, "out"), Path(name, "err")
        process = start_command(words, out, err, REPOSITORY, environment)
        deadline = time.monotonic() + 120
        found = None
        while found is None and process.is_alive() and time.monotonic() < deadline:
            time.sleep(0.05)
            found = re.search(r" at (http://\S+)", err.read_text()) if err.exists() else None
        assert found is not None, err.read_text()
        try:
            yield Server(found[1], process, err)
        finally:
            if process.is_alive():
                process.terminate()
                process.join(20)
            if process.is_alive():
                process.kill()
                process.join()
