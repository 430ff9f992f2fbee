"""Whether the Hugging Face hub can be reached, asked once, before anything waits for it.

Without a network the hub's client retries for half a minute for each file; told that it is offline, it uses what is
cached, or says at once that something is missing.
"""

import logging
import os
import socket
from urllib.parse import urlsplit
from urllib.request import getproxies

log = logging.getLogger(__name__)


def go_offline_if_unreachable(timeout: float = 3.0) -> None:
    """Set `HF_HUB_OFFLINE` if the hub does not take a connection; must come before huggingface_hub is imported.

    Does nothing where the variable is set already, or where a proxy stands between.

    Args:
        timeout: seconds to wait.
    """
    if "HF_HUB_OFFLINE" in os.environ or getproxies():
        return
    endpoint = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    try:
        port = endpoint.port or (80 if endpoint.scheme == "http" else 443)
        socket.create_connection((endpoint.hostname or "", port), timeout).close()
    except OSError as error:
        log.warning("the hub at %s cannot be reached (%s): only cached files are used", endpoint.hostname, error)
        os.environ["HF_HUB_OFFLINE"] = "1"
