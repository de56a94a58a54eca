"""Connections of clients: one that sends nothing is closed, rather than held forever."""

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol


def guarded_protocol(seconds: float) -> type[asyncio.Protocol]:
    """Return uvicorn's protocol for connections on which the head of a first request has to come within a time.

    uvicorn closes connections that have become idle after a request, and the guard ends bodies that come too slowly;
    of a connection that never sends a whole head neither hears.
    """

    class GuardedProtocol(H11Protocol):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._first_request = self.loop.call_later(seconds, self._close_if_silent)

        def connection_lost(self, exc: Exception | None) -> None:
            self._first_request.cancel()
            super().connection_lost(exc)

        def _close_if_silent(self) -> None:
            if vars(self)["cycle"] is None:  # it has one from its first request on
                self.transport.abort()

    return GuardedProtocol
