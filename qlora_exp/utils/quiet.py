"""Hide library messages and warnings that the user can do nothing about."""

import logging
import os
import sys
import warnings

from qlora_exp.utils.display import RedactingFormatter


def hide_bars() -> None:
    """Turn off transformers' progress bars if stderr is not a terminal. Call it after transformers is imported."""
    from transformers.utils import logging as transformers_logging

    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()


def quiet() -> None:
    """Turn down the logging of libraries. Call it before they are imported; it imports none of them."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")  # many short bars; our own bars cover long tasks
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for handler in (*logging.getLogger().handlers, *filter(None, [logging.lastResort])):
        handler.setFormatter(RedactingFormatter("%(message)s"))
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"(bitsandbytes|torch|peft|trl|transformers)\b")
    for name in (
        "alembic",
        "mlflow",
        "httpx",
        "datasets",
        "urllib3",
        "evaluate",
        "absl",
        "bitsandbytes",
        "transformers",
        "torchao",
        "torch.utils._pytree",  # torchao causes its warnings
    ):
        logging.getLogger(name).setLevel(logging.ERROR)
    # It logs the traceback of each error that it raises as well.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
