"""What all endpoints of a server share."""

from collections.abc import Sequence
from dataclasses import dataclass

from fastapi import Request

from megatron_7b.serving.engine import ServingEngine
from megatron_7b.serving.metrics import Metrics
from megatron_7b.serving.options import ServerOptions
from megatron_7b.serving.served import ServedModel


@dataclass(frozen=True)
class ServerState:
    """A server.

    Attributes:
        models: In the order of their numbers.
        engine: What does the work.
        options: Limits.
        metrics: What is counted.
    """

    models: Sequence[ServedModel]
    engine: ServingEngine
    options: ServerOptions
    metrics: Metrics


def state_of(request: Request) -> ServerState:
    """Return the server that a request has come to."""
    state = request.app.state.server
    assert isinstance(state, ServerState)
    return state
