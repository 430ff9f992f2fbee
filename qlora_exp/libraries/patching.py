"""Replace attributes of other libraries' modules temporarily."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any


@contextmanager
def patched(module: ModuleType, **attributes: Any) -> Iterator[None]:
    """Replace attributes of a module within the context, and restore them afterwards, also after an error.

    Raises:
        AttributeError: the module has no such attribute, so the replacement would have no effect.
    """
    before = {name: getattr(module, name) for name in attributes}
    try:
        vars(module).update(attributes)
        yield
    finally:
        vars(module).update(before)
