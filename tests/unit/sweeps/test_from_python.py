import sys

import pytest

import qlora_exp
from qlora_exp.sweeps import from_python
from qlora_exp.utils.errors import ConfigError, SweepError


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("--cfg=job", "--cfg=job is an option"),
        ("sweep.name=mine", "as the argument `name`"),
        ("+tracking.uri=sqlite:///x.db", "as the argument `uri`"),
    ],
)
def test_what_is_no_key_of_a_sweep_is_rejected(word: str, says: str):
    with pytest.raises(ConfigError, match=says):
        qlora_exp.sweep("ranks", word)


def test_refused_sweep_is_an_error_and_its_reason_is_printed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SweepError, match="sweep ranks ended with status 1"):
        qlora_exp.sweep("ranks", "method=lora", "method.rank=4,8")
    assert "method.rank" in capsys.readouterr().out


def test_interrupted_sweep_gets_time_to_end(tmp_path, monkeypatch):
    """A notebook interrupts the kernel alone: the sweep must get the signal too, and record how it ended."""
    program = tmp_path / "python"
    program.write_text(
        f"#!{sys.executable}\nimport time, pathlib\n"
        f"try:\n    print('job 1', flush=True)\n    time.sleep(60)\nexcept KeyboardInterrupt:\n"
        f"    pathlib.Path({str(tmp_path / 'ended')!r}).touch()\n"
    )
    program.chmod(0o755)
    monkeypatch.setattr(from_python.sys, "executable", str(program))

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.print", interrupt)
    with pytest.raises(KeyboardInterrupt):
        from_python.sweep("ranks")
    assert (tmp_path / "ended").exists()
