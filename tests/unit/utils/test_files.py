import fcntl
import json
import os
import stat
from pathlib import Path

import pytest

from qlora_exp.utils.errors import ModelError
from qlora_exp.utils.files import (
    check_source,
    copy_without_links,
    open_inside,
    own_user,
    replacing,
    scratch_folder,
    size_on_disk,
    write_atomically,
)


def test_size_on_disk_counts_all_files(tmp_path):
    (tmp_path / "a").write_bytes(bytes(10))
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "c").write_bytes(bytes(5))
    assert size_on_disk(tmp_path) == 15


def test_file_is_replaced_atomically(tmp_path):
    file = tmp_path / "state.json"
    (tmp_path / "plain").touch()
    write_atomically(file, "old")
    write_atomically(file, json.dumps({"new": True}))
    assert json.loads(file.read_text()) == {"new": True}
    assert file.stat().st_mode == (tmp_path / "plain").stat().st_mode  # as the umask says
    with pytest.raises(ValueError, match="no more"), replacing(file) as lines:
        lines.write("half")
        raise ValueError("no more")
    assert sorted(path.name for path in Path(tmp_path).iterdir()) == ["plain", "state.json"]
    assert json.loads(file.read_text()) == {"new": True}


def test_link_is_replaced_and_not_written_through(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    for name in ("x.json", "x.json.part", ".x.json.part"):
        (tmp_path / name).symlink_to(victim)
    write_atomically(tmp_path / "x.json", "new")
    assert ((tmp_path / "x.json").read_text(), victim.read_text()) == ("new", "mine")
    assert not (tmp_path / "x.json").is_symlink()


def test_leftovers_of_killed_processes_are_removed_but_not_those_in_use(tmp_path):
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "file").write_text("mine")
    (tmp_path / ".qlora_exp.1.part").write_text("half")
    (tmp_path / ".qlora_exp.2.part").mkdir()
    (tmp_path / ".qlora_exp.2.part" / "half").touch()
    (tmp_path / ".qlora_exp.3.part").symlink_to(victim)
    os.mkfifo(tmp_path / "fifo")
    with scratch_folder(tmp_path) as used, open(tmp_path / ".qlora_exp.4.part", "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        (used / "part").touch()
        assert stat.S_IMODE(used.stat().st_mode) == 0o700
        write_atomically(tmp_path / "new", "")
        assert (used / "part").exists()
        assert sorted(path.name for path in tmp_path.glob(".*")) == sorted(
            [".qlora_exp.3.part", ".qlora_exp.4.part", used.name]
        )
    assert not used.exists()
    assert (victim / "file").read_text() == "mine"


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("link", "a link"),
        ("links/file", "a link"),
        ("folder/link", "a link"),
        ("folder/up/outside", "a link"),
        ("../outside", "not a path inside"),
        ("folder/../../outside", "not a path inside"),
        ("/etc/hostname", "not a path inside"),
        ("", "not a path inside"),
        ("folder", "not a regular file"),
        ("fifo", "not a regular file"),
        ("nul\0", "null byte"),
        ("x" * 5000, "too long"),
        ("none", "No such file"),
        ("file/below", "a link, or below"),
    ],
)
def test_only_regular_files_inside_a_folder_are_opened(path, problem, tmp_path):
    inside = tmp_path / "run"
    (inside / "folder").mkdir(parents=True)
    for file in (tmp_path / "outside", inside / "file", inside / "folder" / "file"):
        file.write_text("text")
    (inside / "link").symlink_to(tmp_path / "outside")
    (inside / "folder" / "link").symlink_to(inside / "file")
    (inside / "folder" / "up").symlink_to(tmp_path)
    (inside / "links").symlink_to(inside / "folder")
    os.mkfifo(inside / "fifo")
    with open_inside(inside, "folder/file", own_user(inside)) as opened:
        assert opened.read() == b"text"
    (tmp_path / "named").symlink_to(inside)  # what the user names may be a link
    open_inside(tmp_path / "named", "file").close()
    with pytest.raises(OSError, match=problem):
        open_inside(inside, path)


def test_files_of_other_users_are_told_apart(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").touch()
    assert own_user(tmp_path) == (tmp_path / "folder").stat().st_uid
    with pytest.raises(PermissionError, match="belongs to another user"):
        open_inside(tmp_path, "folder/file", own_user(tmp_path) + 1)


def test_no_descriptor_stays_open(tmp_path):
    (tmp_path / "file").touch()
    before = len(os.listdir("/proc/self/fd"))
    for path in ("file", "none", "../x"):
        try:
            open_inside(tmp_path, path).close()
        except OSError:
            continue
    write_atomically(tmp_path / "file", "")
    with scratch_folder(tmp_path):
        pass
    assert len(os.listdir("/proc/self/fd")) == before


def test_folder_is_copied_without_links(tmp_path):
    (tmp_path / "from" / "below").mkdir(parents=True)
    (tmp_path / "from" / "below" / "file").write_text("text")
    for name in ("to", "again"):
        (tmp_path / name).mkdir()
    copy_without_links(tmp_path / "from", tmp_path / "to")
    assert (tmp_path / "to" / "below" / "file").read_text() == "text"
    (tmp_path / "from" / "more").symlink_to(tmp_path / "from" / "below")
    with pytest.raises(OSError, match="a link"):
        copy_without_links(tmp_path / "from", tmp_path / "again")


@pytest.mark.parametrize("source", ["./nowhere", "../gone", "outputs/gone", "~/gone", "/gone"])
def test_source_that_can_only_be_a_folder_must_exist(source: str):
    with pytest.raises(ModelError, match=f"{source}: there is no such folder; name a run, models"):
        check_source(source)


@pytest.mark.parametrize("source", [".", "0a1b2c", "r=8, s=1.5", "models:/m-1", "models:/concrete@champion"])
def test_source_that_may_exist_is_accepted(source: str):
    check_source(source)
