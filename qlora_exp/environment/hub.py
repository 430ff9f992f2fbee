"""Check once whether the Hugging Face hub can be reached, before anything waits for it.

Without a network, the hub's client retries for half a minute for each file. In offline mode it uses cached files, or
reports at once that a file is missing.
"""

import logging
import os
import re
import socket
from pathlib import Path
from typing import Literal
from urllib.parse import SplitResult, urlsplit
from urllib.request import getproxies

from qlora_exp.config.schema import Config
from qlora_exp.utils.errors import ConfigError

log = logging.getLogger(__name__)


def is_needed(config: Config) -> bool:
    """Return whether `config` needs the hub, for its model, datasets or lm-eval tasks."""
    local_tasks = not config.evaluation.lm_eval_tasks or config.evaluation.lm_eval_include_path is not None
    return config.model.from_hub or any(dataset.hub_paths for dataset in config.datasets) or not local_tasks


def go_offline_if_unreachable(timeout: float = 3.0) -> None:
    """Set `HF_HUB_OFFLINE` if the hub does not accept a connection; call this before huggingface_hub is imported.

    Does nothing if the variable is already set, or if connections go through a proxy.

    Args:
        timeout: seconds to wait for the connection.
    """
    if "HF_HUB_OFFLINE" not in os.environ and (why := unreachable(timeout)):
        log.warning("the hub at %s cannot be reached (%s): only cached files are used", _endpoint().hostname, why)
        os.environ["HF_HUB_OFFLINE"] = "1"


def is_offline() -> bool:
    """Return whether only cached files of the hub are used, as `HF_HUB_OFFLINE` says in huggingface_hub's spelling."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def unreachable(timeout: float = 3.0) -> str:
    """Return why the hub accepts no connection; empty if it does, or if connections go through a proxy.

    Args:
        timeout: seconds to wait for the connection.
    """
    if getproxies():
        return ""
    endpoint = _endpoint()
    try:
        port = endpoint.port or (80 if endpoint.scheme == "http" else 443)
        socket.create_connection((endpoint.hostname or "", port), timeout).close()
    except (OSError, ValueError) as error:
        return str(error)
    return ""


def _endpoint() -> SplitResult:
    return urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))


def commit(repo_id: str, revision: str | None, repo_type: Literal["model", "dataset"]) -> str:
    """Return the current commit of a repository's `revision` (None: default branch); without a network, the cached one.

    If neither the hub nor the cache has it, return the revision's name: the run itself will report what is missing.

    Raises:
        ConfigError: nothing on the hub can have this name.
    """
    if revision and re.fullmatch(r"[0-9a-f]{40}", revision):
        return revision
    go_offline_if_unreachable()
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
    from huggingface_hub.file_download import repo_folder_name

    name = revision or constants.DEFAULT_REVISION
    try:
        return str(HfApi().repo_info(repo_id, repo_type=repo_type, revision=name, timeout=10).sha)
    except HFValidationError as error:
        raise ConfigError(
            f"there is no such {repo_type}: {repo_id!r:.200} is neither a local file or folder nor a name on the hub "
            "(ORG/NAME)"
        ) from error
    except (HfHubHTTPError, OfflineModeIsEnabled, ConnectionError, ValueError) as error:
        log.debug("%s: the hub did not return the commit: %s", repo_id, error)
    ref = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo_id, repo_type=repo_type) / "refs" / name
    return ref.read_text("utf-8").strip() if ref.is_file() else name
