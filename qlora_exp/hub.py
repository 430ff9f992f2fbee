"""Whether the Hugging Face hub can be reached, asked once, before anything waits for it.

Without a network the hub's client retries for half a minute for each file; told that it is offline, it uses what is
cached, or says at once that something is missing.
"""

import logging
import os
import socket
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

from qlora_exp.schema import Config

log = logging.getLogger(__name__)


def is_needed(config: Config) -> bool:
    """Whether the model or the data of `config` comes from the hub."""
    model, dataset = config.model.model_name_or_path, config.dataset.path
    local_model = model.startswith(("embedded:", "random:")) or Path(model).expanduser().is_dir()
    local_data = dataset.startswith(("embedded:", "reasoning_gym:")) or Path(dataset) in config.dataset.files
    return not (local_model and local_data)


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
