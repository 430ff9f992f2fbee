"""Replace attributes of other libraries' modules and classes temporarily."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any


@contextmanager
def patched(owner: ModuleType | type, **attributes: Any) -> Iterator[None]:
    """Replace attributes of a module or class within the context, and restore them afterwards, also after an error.

    Raises:
        AttributeError: the owner has no such attribute, so the replacement would have no effect.
    """
    before = {name: inspect.getattr_static(owner, name) for name in attributes}
    try:
        for name, value in attributes.items():
            setattr(owner, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)
