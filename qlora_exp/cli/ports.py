"""Check a port before a server is started on it."""

import socket

from qlora_exp.utils.errors import ConfigError


def require_free(host: str, port: int) -> None:
    """Refuse an address that no server can listen on.

    Raises:
        ConfigError: the port is in use, reserved or not a port number, or the host is not this machine.
    """
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except (OSError, OverflowError) as error:
        raise ConfigError(f"cannot serve at {host}:{port}: {error}; choose another: --port NUMBER") from error
