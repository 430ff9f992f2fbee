import os
import stat

import pytest

from qlora_exp.utils.cache import built, cache_dir
from qlora_exp.utils.errors import CacheError


@pytest.fixture(autouse=True)
def _own(tmp_path, monkeypatch):
    monkeypatch.setenv("QLORA_EXP_CACHE", str(tmp_path / "cache"))


def test_folder_is_built_once_and_rebuilt_when_damaged():
    calls = []

    def build(folder) -> None:
        calls.append(folder)
        (folder / "file").write_text("whole")

    folder = built("name", build)
    assert built("name", build) == folder == cache_dir() / "name"
    assert len(calls) == 1
    (folder / "file").write_text("cut")
    assert (built("name", build) / "file").read_text() == "whole"
    assert len(calls) == 2


def test_failed_build_leaves_nothing():
    def build(folder) -> None:
        (folder / "file").write_text("half")
        raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        built("name", build)
    assert [path.name for path in cache_dir().iterdir()] == ["name.lock"]


def test_leftovers_of_a_killed_build_are_removed():
    (cache_dir() / "name.abc").mkdir(parents=True)
    (cache_dir() / "name.abc" / "half").touch()
    (cache_dir() / "names").mkdir()
    built("name", lambda folder: (folder / "file").touch())
    assert sorted(path.name for path in cache_dir().iterdir()) == ["name", "name.lock", "names"]


def test_unwritable_cache_is_reported(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QLORA_EXP_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(CacheError, match="QLORA_EXP_CACHE"):
        built("name", lambda folder: None)


def test_users_do_not_share_what_is_in_a_common_folder(tmp_path, monkeypatch):
    folder = built("name", lambda folder: (folder / "file").write_text("mine"))
    assert folder.is_relative_to(tmp_path / "cache" / f"user-{os.geteuid()}")
    assert stat.S_IMODE(cache_dir().stat().st_mode) == 0o700
    monkeypatch.setattr("qlora_exp.utils.cache.own_user", lambda _: os.geteuid() + 1)
    with pytest.raises(CacheError, match="belongs to another user"):
        built("name", lambda folder: pytest.fail("built"))
    monkeypatch.undo()
    monkeypatch.setenv("QLORA_EXP_CACHE", str(tmp_path / "common"))
    cache_dir().parent.mkdir()
    cache_dir().symlink_to(tmp_path / "cache")
    with pytest.raises(CacheError, match="not a folder"):
        built("name", lambda folder: pytest.fail("built"))
