import os

from qlora_exp.utils.env_file import load_env_file


def test_env_file_is_read_and_does_not_override(tmp_path, monkeypatch):
    monkeypatch.delenv("QLORA_A", raising=False)
    monkeypatch.setenv("QLORA_B", "mine")
    (tmp_path / ".env").write_text("QLORA_A=file\nQLORA_B=file\n")
    load_env_file()
    assert (os.environ.pop("QLORA_A"), os.environ["QLORA_B"]) == ("file", "mine")
