"""Shorten texts for tables and names so that different texts stay different."""

from qlora_exp.utils.digests import text_digest

RUN_NAME = 250
"""Most characters of a run's name in a database of MLflow."""
FILE_NAME = 240
"""Most bytes of a file's or folder's name, with room for a suffix: file systems allow 255."""


def shortened(text: str, most: int = 80) -> str:
    """Put a text on one line of at most `most` characters; what is left out is replaced by a digest of the whole."""
    line = " ".join(text.split()) if "\n" in text or "\r" in text else text
    return text if line == text and len(text) <= most else f"{line[: most - 9]}...{_digest(text)}"


def cut_to_bytes(text: str, most: int) -> str:
    """Return as many characters from the start of a text as fit into `most` bytes of UTF-8."""
    return text.encode()[:most].decode(errors="ignore")


def _digest(text: str) -> str:
    return text_digest(text).hex()[:6]
