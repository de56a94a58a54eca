"""A server, from its start to its end: the web server in a thread, the engine in the main one."""

import contextlib
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from types import FrameType

import uvicorn

from megatron_7b.generation.session import Session
from megatron_7b.runtime.machine.host_memory import available_memory
from megatron_7b.serving.admission import Admission
from megatron_7b.serving.app import build_app
from megatron_7b.serving.connections import guarded_protocol
from megatron_7b.serving.engine import ServingEngine
from megatron_7b.serving.leading import RankLeader
from megatron_7b.serving.listening import let_clients_in, take_address
from megatron_7b.serving.metrics import Metrics
from megatron_7b.serving.models import WritingModel
from megatron_7b.serving.opening import opened_models
from megatron_7b.serving.options import ServerOptions
from megatron_7b.serving.served import ServedModel
from megatron_7b.serving.state import ServerState

logger = logging.getLogger(__name__)

_CACHE_SHARE = 0.4
"""Of the memory that is free once models are loaded: their caches, unless options say otherwise."""


def serve(
    models: Sequence[ServedModel],
    options: ServerOptions,
    *,
    fp32_on_cpu: bool = True,
    on_ready: Callable[[str], None] | None = None,
    taken: socket.socket | None = None,
) -> None:
    """Serve models until a signal asks to stop: SIGTERM or SIGINT.

    Args:
        models: From `read_models`.
        options: Address, keys and limits.
        fp32_on_cpu: Compute in FP32 on a CPU, whatever the configuration says.
        on_ready: Takes the address, on the main rank, once requests are answered.
        taken: The address, from `take_address`; None: the main rank takes it before it loads anything.

    Raises:
        ConfigError: The address cannot be listened at, or the models do not fit.
        CheckpointError: A checkpoint is damaged.

    Collective: all ranks.
    """
    if taken is None and os.environ.get("RANK", "0") == "0":
        taken = take_address(options.host, options.port)
    with (
        contextlib.nullcontext() if taken is None else taken,
        opened_models(models, fp32_on_cpu=fp32_on_cpu, max_batch_size=options.max_batch_size) as opened,
    ):
        writing = {number: model.session for number, model in enumerate(opened) if isinstance(model, WritingModel)}
        for session in writing.values():
            has_prefixes = options.prefix_cache and not session.setup.is_encoder_decoder
            session.limit_cache(_cache_bytes(session, options, len(writing)), prefix_cache=has_prefixes)
            session.setup.grammar_vocabulary.prepare()  # once texts are being written, all of them would wait for it
        layout = (opened[0].session if isinstance(opened[0], WritingModel) else opened[0].model).layout
        leader = RankLeader(
            opened,
            world_size=layout.world_size,
            is_main=layout.is_main,
            timeout_minutes=models[0].config.runtime.distributed_timeout_minutes,
        )
        if not layout.is_main:
            with _ignoring_signals():  # the main rank says when to stop
                leader.follow()
            return
        metrics = Metrics()
        engine = ServingEngine(
            leader,
            {number: _admission(session, options) for number, session in writing.items()},
            max_waiting=options.max_waiting,
            stop_seconds=options.stop_seconds,
            metrics=metrics,
        )
        state = ServerState(models, engine, options, metrics)
        assert taken is not None
        with _stopping_on_signals(engine), _web_server(state, taken, on_ready):
            engine.run()


@contextlib.contextmanager
def _web_server(state: ServerState, taken: socket.socket, on_ready: Callable[[str], None] | None) -> Iterator[None]:
    """Run the web server in a thread for the duration of a with block."""
    options = state.options
    config = uvicorn.Config(
        build_app(state),
        http=guarded_protocol(options.receive_seconds),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        date_header=True,
        proxy_headers=False,
        timeout_keep_alive=options.keep_alive_seconds,
        timeout_graceful_shutdown=5,
        limit_concurrency=options.max_connections,
        backlog=512,
    )
    server = uvicorn.Server(config)
    address = let_clients_in(taken)
    thread = threading.Thread(target=server.run, args=([taken],), name="web-server", daemon=True)
    thread.start()
    if on_ready is not None:
        on_ready(address)
    try:
        yield
    finally:
        server.should_exit = True
        thread.join(timeout=10)


@contextlib.contextmanager
def _stopping_on_signals(engine: ServingEngine) -> Iterator[None]:
    """Stop the engine when a signal asks for it; a second one stops it at once."""

    def stop(_number: int, _frame: FrameType | None) -> None:
        engine.stop()

    former = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _ignoring_signals() -> Iterator[None]:
    former = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def _admission(session: Session, options: ServerOptions) -> Admission:
    tokens, context = session.max_cache_tokens, session.setup.config.model.max_position_embeddings
    assert tokens is not None
    if tokens < context:
        logger.warning("the cache has room for %d tokens, less than the model's context of %d", tokens, context)
    return Admission(
        num_copies=session.layout.dp_size,
        max_rows=options.max_batch_size,
        max_cache_tokens=min(tokens, options.max_batch_size * context),
    )


def _cache_bytes(session: Session, options: ServerOptions, num_models: int) -> int:
    """Return the memory that the cache of one of several models may take on this rank."""
    if options.max_cache_gib is not None:
        return int(options.max_cache_gib * 2**30) // num_models
    return int(_free_bytes(session) * _CACHE_SHARE) // num_models


def _free_bytes(session: Session) -> float:
    """Return this rank's share of the memory that is free."""
    if session.model.device_type == "cuda":
        import torch

        return float(torch.cuda.mem_get_info()[0])
    return available_memory() / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
