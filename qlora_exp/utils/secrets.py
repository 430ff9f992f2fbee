"""Read secrets from a `.env` file, and keep them out of logs, artifacts and MLflow."""

import logging
import os
import re

from dotenv import load_dotenv

from qlora_exp.utils.errors import ConfigError

_SECRET_NAME = re.compile(r"TOKEN|PASSWORD|SECRET|API_?KEY|CREDENTIAL", re.IGNORECASE)
_SHAPES = re.compile(r"\bhf_[A-Za-z0-9]{16,}\b")
_USER_IN_URI = re.compile(r"(?<=://)[^/\s@]+@")


def load_env_file() -> None:
    """Set environment variables from `.env` in the working directory. Variables that are already set stay.

    Raises:
        ConfigError: the file cannot be read, or has a value that an environment variable cannot have.
    """
    try:
        load_dotenv(".env")
    except (OSError, ValueError) as error:
        raise ConfigError(f".env: cannot be read: {error}") from error


def redact(text: str) -> str:
    """Replace values of secret-looking environment variables, hub tokens and users in URIs by `***`."""
    for name, value in os.environ.items():
        if _SECRET_NAME.search(name) and len(value) >= 8:
            text = text.replace(value, "***")
    return _USER_IN_URI.sub("***@", _SHAPES.sub("***", text))


class RedactingFormatter(logging.Formatter):
    """Log formatter that removes secrets from its lines."""

    def format(self, record: logging.LogRecord) -> str:
        """Format a record, including its traceback, without secrets."""
        return redact(super().format(record))
