import json
from pathlib import Path

from qlora_exp.utils.files import size_on_disk, write_atomically


def test_size_on_disk_counts_all_files(tmp_path):
    (tmp_path / "a").write_bytes(bytes(10))
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "c").write_bytes(bytes(5))
    assert size_on_disk(tmp_path) == 15


def test_file_is_replaced_atomically(tmp_path):
    file = tmp_path / "state.json"
    write_atomically(file, "old")
    write_atomically(file, json.dumps({"new": True}))
    assert json.loads(file.read_text()) == {"new": True}
    assert [path.name for path in Path(tmp_path).iterdir()] == ["state.json"]
