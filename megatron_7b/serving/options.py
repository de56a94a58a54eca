"""How a server is reached, and what it takes on. Imports neither torch nor a web framework."""

import ipaddress
import os
import stat
from dataclasses import dataclass
from pathlib import Path

from megatron_7b.errors import ConfigError

MIN_KEY_LENGTH = 16


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """How a server is reached, and its limits.

    Attributes:
        host: Address to listen at.
        port: Port; 0 takes a free one.
        api_keys: Any of them lets a request in; none: everybody on this machine is let in, and nobody else.
        max_batch_size: Texts that share a forward pass.
        max_waiting: Texts that may wait for a place; further ones are refused (429).
        max_cache_gib: Memory for keys and values on each rank, those of all models together; None takes a share of
            what is free once the models are loaded.
        prefix_cache: Keep what texts began with in memory for keys and values that others leave free.
        max_body_mib: Larger requests are refused (413).
        max_request_seconds: A request that takes longer is ended.
        receive_seconds: A client has this long to send a request (slow ones would hold connections).
        keep_alive_seconds: An idle connection is closed after this long.
        stop_seconds: After a signal to stop, running requests have this long to finish.
        max_connections: Open connections; further ones are refused (503).
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = ()
    max_batch_size: int = 32
    max_waiting: int = 256
    max_cache_gib: float | None = None
    prefix_cache: bool = True
    max_body_mib: float = 4.0
    max_request_seconds: float = 600.0
    receive_seconds: float = 30.0
    keep_alive_seconds: int = 30
    stop_seconds: float = 30.0
    max_connections: int = 1024

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ConfigError: One is out of range, or the server would be open to a network without a key.
        """
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"--port is {self.port}, expected 0 to 65535")
        positive = (
            "max_batch_size", "max_waiting", "max_body_mib", "max_request_seconds", "receive_seconds",
            "keep_alive_seconds", "stop_seconds", "max_connections",
        )  # fmt: skip
        for name in (*positive, *(["max_cache_gib"] if self.max_cache_gib is not None else [])):
            if not getattr(self, name) > 0:
                raise ConfigError(f"--{name.replace('_', '-')} is {getattr(self, name)}, expected more than 0")
        if not self.api_keys and not is_loopback(self.host):
            raise ConfigError(
                f"--host {self.host} can be reached from other machines, and no key protects it",
                hint="name a file of keys with --api-key-file K, or leave out --host: the server then listens on "
                "127.0.0.1 only",
            )


def is_loopback(host: str) -> bool:
    """Whether an address or name can be reached from this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def read_api_keys(file: Path) -> tuple[str, ...]:
    """Read a file of keys: one per line, without empty lines and comments (`#`).

    Raises:
        ConfigError: It cannot be read, holds no key or a key that can be guessed, or others may read it.
    """
    try:
        text = file.read_text(encoding="utf-8")
        mode = file.stat().st_mode
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--api-key-file {file} cannot be read: {error}") from None
    if os.name == "posix" and mode & (stat.S_IRWXO):
        raise ConfigError(f"--api-key-file {file} can be read by everybody on this machine", hint=f"chmod 600 {file}")
    keys = [line.strip() for line in text.splitlines()]
    keys = [key for key in keys if key and not key.startswith("#")]
    make = f"(umask 077; python3 -c 'import secrets; print(secrets.token_urlsafe(32))' > {file})"
    if not keys:
        raise ConfigError(f"--api-key-file {file} holds no key", hint=make)
    for number, key in enumerate(keys, 1):
        if len(key) < MIN_KEY_LENGTH or not key.isascii() or any(character.isspace() for character in key):
            raise ConfigError(
                f"key {number} of {file} is no good key: expected at least {MIN_KEY_LENGTH} ASCII characters "
                "without spaces",
                hint=make,
            )
    return tuple(keys)
