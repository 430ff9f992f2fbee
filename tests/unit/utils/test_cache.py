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
