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
TRAIN = [line for line in LINES if re.match(r"(\.venv/bin/)?qlora-exp train", line)]


@pytest.mark.parametrize("line", TRAIN)
def test_readme_train_commands_compose(line: str):
    words = [word for word in shlex.split(line)[2:] if word not in ("-m", "--cfg", "job", "--help", "--dry-run")]
    if " -m " in f"{line} ":
        words = [word for word in words if not re.search(r"=.*,", word)]  # what is swept
    compose(words)


def test_readme_has_train_commands():
    assert len(TRAIN) >= 5


def test_nox_sessions_named_in_the_readme_exist():
    sessions = set(re.findall(r"^def (\w+)\(session", (ROOT / "noxfile.py").read_text("utf-8"), re.MULTILINE))
    named = set(re.findall(r"nox -s (\w+)", README))
    assert {"train", "tests"} <= named <= sessions


def test_ci_runs_the_readmes_test_command():
    commands = [line for line in LINES if line.endswith("nox -s tests")]
    assert len(commands) == 1
    assert commands[0].split("&& ")[-1] in (ROOT / ".ci" / "run").read_text("utf-8")


def test_files_linked_in_the_readme_exist():
    missing = [path for path in re.findall(r"\]\(([\w./-]+)\)", README) if not (ROOT / path).exists()]
    assert missing == []


def test_every_room_is_named_in_the_readme():
    rooms = [file.parent.name for file in (ROOT / "qlora_exp").glob("*/__init__.py")]
    assert len(rooms) > 10
    assert [room for room in rooms if not re.search(rf"\b{room}\b", README)] == []
