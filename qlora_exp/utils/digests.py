"""Digests of values and files.

Run keys, data fingerprints and sweep names recorded by earlier versions are compared with these digests, so the same
value must keep its digest.
"""

import hashlib
import json
from pathlib import Path
from typing import Any


def json_digest(values: Any, digits: int = 16) -> str:
    """Digest plain values, independent of the order of keys. A value without a JSON type is digested as its string."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:digits]


def file_digest(file: Path) -> str:
    """Digest a file's contents."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def text_digest(text: str) -> bytes:
    """Digest a string in 16 bytes, so that sets of digests take less memory than sets of long strings."""
    return hashlib.blake2b(text.encode(), digest_size=16).digest()
