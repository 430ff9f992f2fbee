import os
import sys

import psutil
import pytest

from qlora_exp.environment import provenance


def test_versions_of_relevant_libraries_are_recorded():
    import torch

    found = provenance.libraries()
    assert found["torch"] == torch.__version__
    assert {"peft", "trl", "bitsandbytes", "python", "qlora_exp"} <= found.keys()


def test_dead_processes_are_distinguished_from_living_ones():
    me = provenance.process()
    assert not provenance.is_dead(me)
    assert provenance.is_dead(me | {"started": "0.0"})
    assert not provenance.is_dead(me | {"started": str(float(me["started"]) + 1)})
    assert provenance.is_dead(me | {"pid": str(2**22 + os.getpid())})
    assert not provenance.is_dead(me | {"host": "elsewhere", "started": "0.0"})
    assert not provenance.is_dead(me | {"namespace": "another container", "started": "0.0"})
    assert provenance.is_dead(me | {"started": "nan"})
    for wrong in ({"pid": "abc"}, {"pid": "-1"}, {"started": "x"}):
        with pytest.raises(ValueError, match=r"invalid literal|could not convert|positive"):
            provenance.is_dead(me | wrong)
    assert provenance.is_dead(me | {"boot": "before the machine was started again"})


def test_git_state_is_recorded_or_absent(monkeypatch):
    found = provenance.git()
    assert not found or (len(found["sha"]) == 40 and found["dirty"] in ("true", "false"))
    monkeypatch.setattr(provenance, "__file__", "/nowhere/qlora_exp/provenance.py")
    assert provenance.git() == {}


def test_hardware_is_described():
    assert provenance.hardware()["memory_mib"] > 0


def test_leftovers_of_an_interrupted_pip_are_not_packages(tmp_path, monkeypatch):
    (tmp_path / "~orch-2.0.dist-info").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    for version in ("1.0", "2.0"):  # the second comes before the first
        folder = tmp_path / version / "twice-1.dist-info"
        folder.mkdir(parents=True)
        (folder / "METADATA").write_text(f"Name: twice\nVersion: {version}\n")
        monkeypatch.syspath_prepend(str(folder.parent))
    found = provenance.environment()
    assert found["twice"] == "2.0"
    assert found["torch"]


def test_importing_setuptools_does_not_change_the_packages(tmp_path, monkeypatch):
    before = provenance.environment()
    folder = tmp_path / "setuptools" / "_vendor" / "carried-1.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text("Name: carried\nVersion: 1\n")
    monkeypatch.setattr(sys, "path", [*sys.path, str(folder.parent)])  # as importing it does
    assert provenance.environment() == before


@pytest.mark.parametrize(
    ("argv", "command"),
    [
        (
            ["qlora-exp train", "-m", "seed=1,2", "tracking.run_name=it's a"],
            """train -m seed=1,2 'tracking.run_name=it'"'"'s a'""",
        ),
        (["/venv/bin/qlora-exp", "reproduce", "RUN"], "reproduce RUN"),
        (["/site/qlora_exp/__main__.py", "reproduce", "RUN"], "reproduce RUN"),
        (["qlora-exp train", "+tracking.tags.note=hf_abcdefghijklmnopqrst"], "train '+tracking.tags.note=***'"),
    ],
)
def test_command_line_can_be_pasted(argv, command, monkeypatch):
    monkeypatch.setattr("sys.argv", argv)
    assert provenance.command() == f"qlora-exp {command}"


def test_command_line_of_another_program_is_named(monkeypatch):
    monkeypatch.setattr("sys.argv", ["my script.py", "a"])
    assert provenance.command() == "python 'my script.py' a"


def test_process_that_nobody_waited_for_is_dead():
    begin, end = os.pipe()
    if (child := os.fork()) == 0:
        os.read(begin, 1)
        os._exit(0)
    mine = provenance.process() | {"pid": str(child), "started": str(psutil.Process(child).create_time())}
    assert not provenance.is_dead(mine)
    os.write(end, b"x")
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    assert provenance.is_dead(mine)
    os.waitpid(child, 0)
    os.close(begin)
    os.close(end)
