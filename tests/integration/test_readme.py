"""What the README tells a user to type is accepted by the program of today."""

import re
import shlex
from pathlib import Path

import pytest

from qlora_exp.config.hydra_compose import compose

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text("utf-8")
BLOCKS = re.findall(r"```(?:bash|console)\n(.*?)```", README, re.DOTALL)
LINES = [line.split(" #")[0].strip() for block in BLOCKS for line in block.replace("\\\n", " ").splitlines()]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def composed_commands(page: Path) -> list[list[str]]:
    """List the overrides of each command on a page that composes a config: of swept keys the first value."""
    commands = []
    for block in re.findall(r"```(?:bash|console)\n(.*?)```", page.read_text("utf-8"), re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            if named := re.search(r"(?:qlora-exp|-m qlora_exp) (?:train|plan|advise)\b(.*)", line.split(" #")[0]):
                words = shlex.split(re.sub(r"--price \S+", "", named[1]))
                overrides = [word for word in words if re.match(r"[+~]?[\w./@]+=", word)]
                single = [word for word in overrides if not re.search(r"=(choice|range|interval|tag)\(", word)]
                commands.append([re.sub(r"=([^\[{(,]*),.*", r"=\1", word) for word in single])
    return commands


@pytest.mark.parametrize("page", PAGES, ids=[page.stem for page in PAGES])
def test_commands_on_a_page_compose(page: Path):
    for overrides in composed_commands(page):
        compose(overrides)


def test_pages_have_commands():
    assert sum(len(composed_commands(page)) for page in PAGES) >= 30


def test_ci_runs_the_readmes_test_command():
    assert len([line for line in LINES if line.endswith("nox -s train")]) == 1
    commands = [line for line in LINES if line.endswith("nox -s tests")]
    assert len(commands) == 1
    assert commands[0].split("&& ")[-1] in (ROOT / ".ci" / "run").read_text("utf-8")


def test_every_room_is_named_in_the_readme():
    rooms = [file.parent.name for file in (ROOT / "qlora_exp").glob("*/__init__.py")]
    assert len(rooms) > 10
    assert [room for room in rooms if not re.search(rf"\b{room}\b", README)] == []
