"""Digests of values and files.

Run keys, data fingerprints and sweep names that earlier versions recorded are compared with these: the same value must
keep its digest.
"""

import hashlib
import json
from pathlib import Path
from typing import Any


def json_digest(values: Any, digits: int = 16) -> str:
    """Digest plain values, whatever the order of their keys; what JSON does not have counts as its text."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:digits]


def file_digest(file: Path) -> str:
    """Digest a file's contents."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def text_digest(text: str) -> bytes:
    """Digest a text in 16 bytes: sets of these are smaller than sets of long texts."""
    return hashlib.blake2b(text.encode(), digest_size=16).digest()
