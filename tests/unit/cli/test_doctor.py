import json

import pytest

from qlora_exp.cli.main import main
from qlora_exp.studies import doctor
from qlora_exp.studies.doctor import Finding

FOUND = [
    Finding("CPU", "ok", "two cores"),
    Finding("hub", "warning", "away", "wait"),
    Finding("GPU", "problem", "gone"),
]


def test_problems_fail_the_command(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "findings", lambda uri: iter(FOUND))
    with pytest.raises(SystemExit) as ended:
        main(["doctor"])
    out, err = capsys.readouterr()
    assert ended.value.code == 1
    assert out.splitlines() == [
        "ok       CPU: two cores",
        "warning  hub: away",
        "         -> wait",
        "problem  GPU: gone",
    ]
    assert "problems: 1, warnings: 1" in err


def test_warnings_do_not_fail_the_command(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "findings", lambda uri: iter(FOUND[:2]))
    with pytest.raises(SystemExit) as ended:
        main(["doctor"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.endswith("no problems, warnings: 1\n")


def test_json_is_complete_and_has_no_secrets(monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "secret-of-mine-123")
    monkeypatch.setattr(doctor, "findings", lambda uri: iter([Finding("hub", "ok", "secret-of-mine-123 and more")]))
    with pytest.raises(SystemExit):
        main(["doctor", "--json"])
    assert json.loads(capsys.readouterr().out) == [{"name": "hub", "state": "ok", "what": "*** and more", "remedy": ""}]
