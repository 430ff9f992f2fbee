import json
from pathlib import Path

from support import exit_code


def test_schema_prints_one(capsys):
    assert exit_code("schema", "dataset") == 0
    assert json.loads(capsys.readouterr().out)["title"] == "qlora_exp: an option of dataset"
    assert exit_code("schema") == 0
    assert "training" in json.loads(capsys.readouterr().out)["properties"]


def test_schema_writes_one_for_each_group_and_says_how_to_use_them(tmp_path: Path, capsys):
    assert exit_code("schema", "--out", str(tmp_path / "schemas")) == 0
    assert len([*(tmp_path / "schemas").glob("*.json")]) == 13
    assert f'"{(tmp_path / "schemas" / "model.json").as_posix()}": "**/model/*.yaml"' in capsys.readouterr().out


def test_schema_refuses_an_unknown_group_and_a_folder_that_cannot_be_made(tmp_path: Path, capsys):
    assert exit_code("schema", "datset") == 1
    assert "did you mean 'dataset'" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert exit_code("schema", "--out", str(tmp_path / "file")) == 1
    assert "choose another folder" in capsys.readouterr().err
