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
    checkpoint = folder / "checkpoints" / "checkpoint-2"
    unsaved = "no checkpoint was saved, so the run would begin again; to save some: training.save_strategy=steps "
    for hint, file in (
        ("", folder / "run.log"),
        (f"{unsaved}training.save_steps=20\n", checkpoint / "trainer_state.json"),
        (f"to resume: run the same command with hydra.run.dir={folder}\n", None),
    ):
        with pytest.raises(KeyboardInterrupt):
            train._single_run(composed, folder)
        assert capsys.readouterr().err == hint
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("{}")


@pytest.mark.parametrize(
    ("words", "flags", "overrides"),
    [
        (["-m", "method.r=4,8", "seed=1"], ["multirun"], ["method.r=4,8", "seed=1"]),
        (["method=lora", "-m", "seed=1,2"], ["multirun"], ["method=lora", "seed=1,2"]),
        (["seed=1", "-cd", "conf", "method.r=4", "-r"], ["config_dir", "run"], ["seed=1", "method.r=4"]),
        (["--dry-run", "seed=1"], [], ["seed=1", "sweep.dry_run=true"]),
        (["--config-dir=conf", "seed=1", "--cfg", "job", "~method.r"], ["config_dir", "cfg"], ["seed=1", "~method.r"]),
        (["sweep=rank_scaling"], ["multirun"], ["sweep=rank_scaling"]),
        (["hydra.mode=MULTIRUN", "seed=1,2"], ["multirun"], ["hydra.mode=MULTIRUN", "seed=1,2"]),
        (["sweep=null", "--info", "defaults"], ["info"], []),
        (["sweep=rank_scaling", "sweep=null"], [], []),
    ],
)  # fmt: skip
def test_hydra_gets_flags_and_overrides_in_any_order(words, flags, overrides, tmp_path, monkeypatch):
    (tmp_path / "conf").mkdir()
    handed_over = []
    monkeypatch.setattr("qlora_exp.libraries.hydra.main", lambda arguments, *_: handed_over.append(arguments))
    monkeypatch.setattr("qlora_exp.config.hydra_compose.check_command", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["pytest"])
    assert exit_code("train", *words) == 0
    (arguments,) = handed_over
    assert arguments.overrides == overrides
    assert {name for name, value in vars(arguments).items() if value and name != "overrides"} == {*flags}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-m", "seed=1,2", "--cfg", "job"], "--multirun and --cfg: give one of them"),
        (["--resolve"], "add --cfg job"),
        (["--experimental-rerun", "config.pickle"], "qlora-exp reproduce RUN"),
    ],
)
def test_flags_that_do_not_go_together_are_rejected(words, message, capsys):
    assert exit_code("train", *words) == 1
    shown = capsys.readouterr().err
    assert message in shown
    assert "Traceback" not in shown


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["model.attn_implementation=flash_attention_2"], "use model.attn_implementation=sdpa"),
        (["training.fp16=true"], "training.fp16: needs a CUDA device"),
        (["distributed=ddp", "distributed.num_processes=auto", "device=cpu"], "counts GPUs, and there are none here"),
        ([], "the config is valid here"),
    ],
)
def test_dry_run_checks_this_machine(words, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert exit_code("train", "model=tiny_llama", "--dry-run", *words) == (0 if not words else 1)
    out, err = capsys.readouterr()
    assert says in out + err


def test_dry_run_shows_what_would_be_learned_and_leaves_no_files(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = "".join(f'{{"prompt": "{number}+1=", "completion": "{number + 1}"}}\n' for number in range(40))
    (tmp_path / "rows.jsonl").write_text(rows)
    words = ["model=tiny_llama", "dataset=own", "dataset.path=rows.jsonl", "training.max_steps=-1"]
    assert exit_code("train", *words, "training.num_train_epochs=2", "--dry-run", "unrelated=none") == 0
    out, err = capsys.readouterr()
    row, end = out.rsplit("+1=", 1)
    assert row.splitlines()[-1].isdigit()
    assert end.strip() == f"[[{int(row.splitlines()[-1]) + 1}<|im_end|>]]"
    for line in (
        "36 training rows in an epoch, 4 held-out rows",
        "100% of rows",
        "18 steps of 4 rows",
        "planned peak memory: ",
    ):
        assert line in out + err
    assert {path.name for path in tmp_path.iterdir()} == {"rows.jsonl"}


@pytest.mark.parametrize(
    ("row", "shown"),
    [
        ("ask [[answer]]", "ask [[answer]]"),
        (
            r"\[\[link\]\]" + "a" * 3000 + "[[answer]]",
            r"\[\[link\]\]" + "a" * 488 + " ... 2,012 characters ... " + "a" * 500 + "[[answer]]",
        ),
        ("a" * 3000 + "[[answer]]", "a" * 500 + " ... 2,000 characters ... " + "a" * 500 + "[[answer]]"),
        ("[[" + "b" * 3000 + "]]", "[[" + "b" * 1998 + " ... and 1,004 more characters"),
    ],
)
def test_what_is_learned_of_a_long_row_is_shown(row, shown):
    assert train._excerpt(row) == shown


def test_dry_run_refuses_rows_from_which_nothing_is_learned(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = "".join(f'{{"prompt": "{"long " * 40}{number}", "completion": "yes"}}\n' for number in range(40))
    (tmp_path / "rows.jsonl").write_text(rows)
    words = ["model=tiny_llama", "dataset=own", "dataset.path=rows.jsonl", "training.max_length=8", "unrelated=none"]
    assert exit_code("train", *words, "--dry-run") == 1
    assert "carries loss: every prompt fills training.max_length=8" in capsys.readouterr().err
