"""Who is let in, and how much of a request is read: every request passes here before anything else sees it."""

import asyncio
import hashlib
import hmac
import logging
import time
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any

import orjson

from megatron_7b.serving.engine import ServingEngine
from megatron_7b.serving.errors import ApiError, not_expected, stopping
from megatron_7b.serving.metrics import Metrics
from megatron_7b.serving.options import ServerOptions, is_loopback

logger = logging.getLogger(__name__)

type Scope = MutableMapping[str, Any]
type Message = MutableMapping[str, Any]
type Receive = Callable[[], Awaitable[Message]]
type Send = Callable[[Message], Awaitable[None]]
type App = Callable[[Scope, Receive, Send], Awaitable[None]]

_OPEN_PATHS = frozenset({"/", "/health", "/favicon.ico"})
_PATHS = frozenset(
    {"/", "/health", "/metrics", "/v1/models", "/v1/completions", "/v1/chat/completions", "/v1/embeddings"}
    | {"/v1/classify"}
)
"""What metrics name: a client that asks for anything else must not fill their memory."""

_PATIENCE = 8
"""How many times the limit is read of a body before the connection is closed."""

_SECURITY_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (
        b"content-security-policy",
        (
            b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; font-src 'self'; "
            b"connect-src 'self'; manifest-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        ),
    ),
]


class ApiKeys:
    """The keys that let requests in, compared without telling by the time how much of one is right.

    Args:
        keys: None of them: everybody is let in.
    """

    def __init__(self, keys: Sequence[str]) -> None:
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    def __bool__(self) -> bool:
        """Whether a key is needed."""
        return bool(self._digests)

    def accept(self, authorization: bytes | None) -> bool:
        """Whether a header has one of the keys; all are compared, whichever fits."""
        scheme, _, given = (authorization or b"").partition(b" ")
        digest = hashlib.sha256(given.strip()).digest()
        matches = [hmac.compare_digest(digest, one) for one in self._digests]
        return scheme.lower() == b"bearer" and any(matches)


class Guard:
    """Lets requests in, with their whole body; a web application around another one (ASGI).

    Args:
        app: What answers.
        options: Keys and limits.
        engine: Which may be stopping.
        metrics: What is counted.
    """

    def __init__(self, app: App, options: ServerOptions, engine: ServingEngine, metrics: Metrics) -> None:
        self._app = app
        self._options = options
        self._keys = ApiKeys(options.api_keys)
        self._engine = engine
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":  # no web sockets here
            return
        began, path = time.monotonic(), scope["path"]
        reply = _Reply(send)
        try:
            self._check(scope)
            body = await self._read(scope, receive)
            if scope["method"] == "POST":
                _check_json(body)
            await self._app(scope, _Replay(body, receive), reply)
        except ApiError as error:
            await reply.refuse(error)
        except Exception:
            logger.exception("%s %s has failed", scope["method"], path)
            await reply.refuse(not_expected())
        finally:
            known = path if path in _PATHS else "/static" if path.startswith("/static/") else "other"
            self._metrics.requests.labels(known, str(reply.status or 499)).inc()
            self._metrics.request_seconds.labels(known).observe(time.monotonic() - began)

    def _check(self, scope: Scope) -> None:
        headers = dict(reversed(scope["headers"]))  # of several, the first counts
        path, method = scope["path"], scope["method"]
        if not self._keys:
            _check_is_local(headers)
        elif not _is_open(path) and not self._keys.accept(headers.get(b"authorization")):
            given = "is wrong" if b"authorization" in headers else "is missing"
            raise ApiError(401, f"the API key {given}; send it as `Authorization: Bearer KEY`", code="invalid_api_key")
        if self._engine.is_stopping and method == "POST":
            raise stopping()

    async def _read(self, scope: Scope, receive: Receive) -> bytes:
        """Return the body, if it is not too large and does not take too long.

        Raises:
            ApiError: It is, or does.
        """
        if scope["method"] in ("GET", "HEAD", "OPTIONS"):
            return b""
        limit = int(self._options.max_body_mib * 2**20)
        headers = dict(scope["headers"])
        if scope["method"] == "POST" and not _is_json(headers.get(b"content-type", b"")):
            given = headers.get(b"content-type", b"none").decode("latin-1")[:100]
            raise ApiError(415, f"the Content-Type is {given}, expected application/json", code="not_json")
        body, size = bytearray(), 0
        try:
            async with asyncio.timeout(self._options.receive_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ApiError(400, "the client left before it had sent its request")
                    piece = message.get("body", b"")
                    size += len(piece)
                    if size <= limit:
                        body += piece
                    # What is a little too large is read and forgotten: a client that still sends hears no answer.
                    is_last = not message.get("more_body", False)
                    if size > limit and (is_last or size > _PATIENCE * limit):
                        raise _too_large(limit)
                    if is_last:
                        return bytes(body)
        except TimeoutError:
            seconds = self._options.receive_seconds
            raise ApiError(408, f"the request was not complete after {seconds:g} s", code="slow_request") from None


class _Replay:
    """Gives the application a body that was read already, then what comes from the client."""

    def __init__(self, body: bytes, receive: Receive) -> None:
        self._body: bytes | None = body
        self._receive = receive

    async def __call__(self) -> Message:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        return await self._receive()


class _Reply:
    """Sends a reply, and remembers its status."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.status: int | None = None

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message["headers"] = [*message.get("headers", ()), *_SECURITY_HEADERS]
        await self._send(message)

    async def refuse(self, error: ApiError) -> None:
        """Send an error, unless the reply has begun already."""
        if self.status is not None:
            return
        body = orjson.dumps(error.content)
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        headers += [(name.lower().encode(), value.encode()) for name, value in error.headers.items()]
        if error.status in (408, 413):  # what is left of the request is not read
            headers.append((b"connection", b"close"))
        await self({"type": "http.response.start", "status": error.status, "headers": headers})
        await self({"type": "http.response.body", "body": body})


def _check_is_local(headers: MutableMapping[bytes, bytes]) -> None:
    """Without a key, refuse what a page of another site makes a browser on this machine send.

    Raises:
        ApiError: The request names another host than this machine (a name that leads here), or comes from a page of
            another site.
    """
    host = headers.get(b"host", b"localhost").decode("latin-1")
    if not is_loopback(_without_port(host)):
        raise ApiError(
            403,
            f"the request is for the host {host[:100]!r}, but without a key only this machine is served, as localhost; "
            "start the server with --api-key-file",
            code="foreign_host",
        )
    origin = headers.get(b"origin")
    if origin is not None and origin.decode("latin-1").partition("://")[2] != host:
        raise ApiError(403, "the request comes from a page of another site", code="foreign_origin")


def _is_open(path: str) -> bool:
    """Whether a path needs no key: it holds nothing that is worth one."""
    return path in _OPEN_PATHS or path.startswith("/static/")


def _without_port(host: str) -> str:
    if host.startswith("["):
        return host.partition("]")[0] + "]"
    return host.partition(":")[0]


def _is_json(content_type: bytes) -> bool:
    return content_type.partition(b";")[0].strip().lower() == b"application/json"


def _check_json(body: bytes) -> None:
    """Check that a body is JSON, with neither NaN nor half characters, which the framework's reader lets pass.

    Raises:
        ApiError: It is not.
    """
    try:
        orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise ApiError(400, f"the body is no JSON: {error}", code="invalid_json") from None


def _too_large(limit: int) -> ApiError:
    return ApiError(413, f"the request is larger than {limit / 2**20:g} MiB", code="body_too_large")
