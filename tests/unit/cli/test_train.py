import sys

import pytest
from omegaconf import OmegaConf
from support import exit_code

from qlora_exp.cli import train


def test_an_interrupted_run_says_how_to_go_on(make_config, tmp_path, monkeypatch, capsys):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("qlora_exp.recipe.finetune.run", interrupted)
    composed, folder = OmegaConf.create(make_config().model_dump(mode="json")), tmp_path / "run"
    for hint in ("", f"to resume: run the same command with hydra.run.dir={folder}\n"):
        with pytest.raises(KeyboardInterrupt):
            train._single_run(composed, folder)
        assert capsys.readouterr().err == hint
        checkpoint = folder / "checkpoints" / "checkpoint-2"
        checkpoint.mkdir(parents=True, exist_ok=True)
        (checkpoint / "trainer_state.json").write_text("{}")


@pytest.mark.parametrize(
    ("words", "handed_over"),
    [
        (["-m", "method.r=4,8", "--cfg", "job", "~tracking"], ["-m", "method.r=4,8", "--cfg", "job", "~tracking"]),
        (["method.r=4", "--dry-run", "-cd", "conf"], ["method.r=4", "-cd", "conf", "sweep.dry_run=true"]),
        (["--config-dir=x", "--dry"], ["--config-dir=x", "--dry"]),
    ],
)
def test_hydra_gets_every_word_but_dry_run(words, handed_over, monkeypatch):
    def stop(*_, **__):
        return lambda job: lambda: None

    monkeypatch.setattr("hydra.main", stop)
    monkeypatch.setattr("qlora_exp.config.hydra_compose.check_command", lambda _: None)
    monkeypatch.setattr(sys, "argv", ["pytest"])
    assert exit_code("train", *words) == 0
    assert sys.argv == ["qlora-exp train", *handed_over]
