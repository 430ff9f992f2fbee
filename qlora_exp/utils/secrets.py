"""Keep secrets out of logs, artifacts and MLflow; take them in from a `.env` file."""

import logging
import os
import re

from dotenv import load_dotenv

from qlora_exp.utils.errors import ConfigError

_SECRET_NAME = re.compile(r"TOKEN|PASSWORD|SECRET|API_?KEY|CREDENTIAL", re.IGNORECASE)
_SHAPES = re.compile(r"\bhf_[A-Za-z0-9]{16,}\b")
_USER_IN_URI = re.compile(r"(?<=://)[^/\s@]+@")


def load_env_file() -> None:
    """Set variables of `.env` in the working directory, without replacing those that are set.

    Raises:
        ConfigError: it cannot be read, or has a value that no variable can have.
    """
    try:
        load_dotenv(".env")
    except (OSError, ValueError) as error:
        raise ConfigError(f".env: cannot be read: {error}") from error


def redact(text: str) -> str:
    """`text` without the values of secret-looking environment variables, hub tokens, or users in URIs."""
    for name, value in os.environ.items():
        if _SECRET_NAME.search(name) and len(value) >= 8:
            text = text.replace(value, "***")
    return _USER_IN_URI.sub("***@", _SHAPES.sub("***", text))


class RedactingFormatter(logging.Formatter):
    """A formatter whose lines carry no secrets."""

    def format(self, record: logging.LogRecord) -> str:
        """The record's line, tracebacks included, redacted."""
        return redact(super().format(record))
