"""The address of a server: taken before its models load, which takes minutes; clients are let in once they have."""

import socket

from megatron_7b.errors import ConfigError

_BACKLOG = 512


def take_address(host: str, port: int) -> socket.socket:
    """Return a socket that has an address of this machine for itself, and does not listen yet.

    Args:
        host: Name or address; one of IPv6 may be in brackets.
        port: 0 takes a free one.

    Raises:
        ConfigError: The address is taken, or none of this machine's.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise _refusal(host, port, error) from None
    taken = socket.socket(family, kind, protocol)
    for reuse in (0, 1):  # the connections of a server that has just ended hold its port, but not against the second
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, reuse)
        try:
            taken.bind(address)
            return taken
        except OSError as error:
            problem = error
    taken.close()
    raise _refusal(host, port, problem)


def let_clients_in(taken: socket.socket) -> str:
    """Listen at an address that was taken; return it as a URL.

    Raises:
        ConfigError: Another process listens there by now.
    """
    host, port = taken.getsockname()[:2]
    taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # its connections inherit it: see above
    try:
        taken.listen(_BACKLOG)
    except OSError as error:
        raise _refusal(host, port, error) from None
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _refusal(host: str, port: int, error: OSError) -> ConfigError:
    return ConfigError(
        f"--host {host} --port {port} cannot be listened at: {error.strerror or error}",
        hint="take another --port; 0 finds a free one",
    )
