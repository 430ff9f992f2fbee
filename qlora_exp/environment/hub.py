"""Whether the Hugging Face hub can be reached, asked once, before anything waits for it.

Without a network the hub's client retries for half a minute for each file; told that it is offline, it uses what is
cached, or says at once that something is missing.
"""

import logging
import os
import re
import socket
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit
from urllib.request import getproxies

from qlora_exp.config.schema import Config

log = logging.getLogger(__name__)


def is_needed(config: Config) -> bool:
    """Whether the model or the data of `config` comes from the hub."""
    model = config.model.model_name_or_path
    local_model = model.startswith(("embedded:", "random:")) or Path(model).expanduser().is_dir()
    local_data = all(
        one.path.startswith(("embedded:", "reasoning_gym:")) or Path(one.path) in one.files for one in config.datasets
    )
    local_tasks = not config.evaluation.lm_eval_tasks or config.evaluation.lm_eval_include_path is not None
    return not (local_model and local_data and local_tasks)


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


def commit(repo_id: str, revision: str | None, repo_type: Literal["model", "dataset"]) -> str:
    """The commit that `revision` (None: the default branch) of a repository is now; the cached one without a network.

    Where neither the hub nor the cache tells it, it is the revision's name: the run itself will say what is missing.
    """
    if revision and re.fullmatch(r"[0-9a-f]{40}", revision):
        return revision
    go_offline_if_unreachable()
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
    from huggingface_hub.file_download import repo_folder_name

    name = revision or constants.DEFAULT_REVISION
    try:
        return str(HfApi().repo_info(repo_id, repo_type=repo_type, revision=name, timeout=10).sha)
    except (HfHubHTTPError, OfflineModeIsEnabled, ConnectionError, ValueError) as error:
        log.debug("%s: the hub does not tell its commit: %s", repo_id, error)
    ref = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo_id, repo_type=repo_type) / "refs" / name
    return ref.read_text("utf-8").strip() if ref.is_file() else name
