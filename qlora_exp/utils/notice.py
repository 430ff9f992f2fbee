"""Tell the user why nothing happens."""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def notice_if_slow(text: str, seconds: float = 5.0) -> Iterator[None]:
    """Print a line to standard error if the `with` block takes longer than `seconds`."""
    timer = threading.Timer(seconds, print, (text,), {"file": sys.stderr, "flush": True})
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
