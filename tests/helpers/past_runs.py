"""Recorded runs that nobody trained."""

ROWS = [3.0, 3.5, 2.5, 4.0, 3.2, 2.8, 3.9, 3.1]


def shifted(by: float, wobble: float = 0.02) -> list[float]:
    """Shift the losses of rows, with a little noise that pairs cannot cancel."""
    return [row + by + wobble * (-1) ** index for index, row in enumerate(ROWS)]
