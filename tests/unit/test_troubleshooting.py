"""Messages on the page of troubleshooting are those that the code prints."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
QUOTED = re.findall(r"^### `(.+)`$", (ROOT / "docs" / "troubleshooting.md").read_text("utf-8"), re.MULTILINE)
SHORTEST = 6


def text_of(node: ast.AST) -> str:
    """Return the text of a literal, with … for each value in it."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) if isinstance(part, ast.Constant) else "…" for part in node.values)
    if isinstance(node, ast.BinOp):
        return text_of(node.left) + text_of(node.right)
    return "…"


@cache
def texts() -> list[str]:
    found = []
    for file in (ROOT / "qlora_exp").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.JoinedStr | ast.BinOp) or (
                isinstance(node, ast.Constant) and isinstance(node.value, str)
            ):
                found.append(re.sub(r"%(?:[.\d]*[sdfg])", "…", text_of(node)))
    return found


def test_there_are_messages():
    assert len(QUOTED) > 50
    assert len(QUOTED) == len(set(QUOTED))


@pytest.mark.parametrize("message", QUOTED)
def test_quoted_message_is_in_the_code(message: str):
    """Each part between two … is written in the code."""
    message = message.replace("loss is nan", "… is …")  # what people search for; the code names what it is
    parts = [part for part in message.split("…") if len(part.strip(" ;:.,()[]'")) >= SHORTEST]
    assert parts
    for part in parts:
        assert any(part.strip(" ;:.,()'") in text for text in texts()), part
