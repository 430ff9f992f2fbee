import subprocess
import sys

import pytest
import yaml
from support import QUICK, command, exit_code

LIGHT = [
    ["--help"],
    ["train", "--help"],
    ["train", "--cfg", "job"],
    ["train", "method.r=0"],
    ["train", "model.model_name_or_path=./none"],
    ["keys"],
    ["ui"],
]


def test_light_commands_do_not_import_torch():
    code = (
        "import sys\n"
        "from qlora_exp.cli.main import main\n"
        f"for arguments in {LIGHT}:\n"
        "    try: main(arguments)\n"
        "    except SystemExit: pass\n"
        "    heavy = {'torch', 'transformers', 'mlflow', 'datasets'} & set(sys.modules)\n"
        "    assert not heavy, f'heavy import: {heavy} by {arguments}'"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "heavy import" not in result.stderr
    assert result.returncode == 0


def test_cfg_job_prints_the_whole_config():
    result = command("train", "method=lora", "--cfg", "job")
    assert yaml.safe_load(result.stdout)["method"]["name"] == "lora"


def test_help_lists_groups_and_experiments(capsys):
    assert exit_code("train", "--help") == 0
    text = capsys.readouterr().out
    assert "smollm2_faq_qlora" in text
    assert "nf4_double" in text


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["methd=lora"], "did you mean 'method'"),
        (["training.lr=1"], "did you mean 'training.learning_rate'"),
        (["training.zzz=1"], "`qlora-exp keys training` lists them"),
        (["method.rank=1"], "did you mean 'r'"),
        (["output_dir=x"], "hydra.run.dir=FOLDER"),
        (["hydra.run.dir=/proc/nope"], "cannot write to the output folder"),
        (["method.r=0", "--cfg", "job"], "must be positive"),
        (["-m", "method.r=4,8", "seed=1,x"], "in: method.r=4 seed=x"),
        (["tracking=server"], "tracking.uri: must be given"),
        (["dataset=own", "dataset.path=gone.jsonl"], "no file gone.jsonl"),
        (["+foo=1"], "foo: no such key"),
        (["method=lorra"], "did you mean 'lora'"),
        (["experiment=smollm2_faq_qlor"], "did you mean 'smollm2_faq_qlora'"),
        (["method.r=0"], "must be positive"),
        (["method.r=1,2"], "--multirun"),
        (["model=hub"], "model.model_name_or_path: must be given"),
    ],
)
def test_mistakes_get_one_clear_message_and_leave_nothing(overrides: list[str], message: str, tmp_path, capfd):
    assert exit_code("train", *overrides) == 1
    shown = capfd.readouterr().err
    assert message in shown
    assert "Traceback" not in shown
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_sweep_runs_every_combination_and_reports(device: str, mlflow_uri, tmp_path):
    from qlora_exp.tracking.tracker import client

    words = [
        *QUICK, f"tracking.uri={mlflow_uri}", f"tracking.experiment_name=sweep_{device}", f"device={device}",
        "method=lora", "method.r=2,4", "seed=1,2", "evaluation=loss_only", "sweep.n_jobs=2",
    ]  # fmt: skip
    assert exit_code("train", "-m", *words) == 0
    mlflow = client(mlflow_uri)
    runs = mlflow.search_runs([mlflow.get_experiment_by_name(f"sweep_{device}").experiment_id], "params.seed LIKE '%'")
    assert {(run.data.params["method.r"], run.data.params["seed"]) for run in runs} == {
        (r, s) for r in "24" for s in "12"
    }
    logs = [*(tmp_path / "multirun").glob("*/*/output.log")]
    assert ["held-out loss" in log.read_text() for log in logs] == [True] * 4
    assert len(list((tmp_path / "multirun").glob("*/*/journal.jsonl"))) == 4


def test_a_failure_is_shown_without_a_traceback_and_ends_with_1(mlflow_uri, capfd):
    assert exit_code("train", "model=tiny_llama", f"tracking.uri={mlflow_uri}", "training.max_length=5") == 1
    shown = capfd.readouterr().err
    assert "error: no token of the" in shown
    assert "Traceback" not in shown


def test_wrong_usage_ends_with_2(capsys):
    assert command("trian").returncode == 2
    assert exit_code("keys", "traning") != 0
    assert "did you mean 'training'" in capsys.readouterr().err


def test_every_command_says_the_same_of_rows_that_it_recognizes(write_jsonl, capfd):
    turns = [[{"from": "human", "value": f"q {n}"}, {"from": "gpt", "value": "a"}] for n in range(30)]
    path = write_jsonl([{"conversations": said} for said in turns])
    words = ["dataset=own", f"dataset.path={path}", "device=cpu", "model=tiny_llama", "method=lora"]
    line = "rows recognized as ShareGPT (`conversations`): dataset.format=chat dataset.messages_column=conversations"
    for verb in (["train", "--dry-run"], ["train", "-m", "method.r=4,8", "--dry-run"], ["plan"]):
        assert exit_code(*verb, *words) == 0
        assert "".join(capfd.readouterr()).count(line) == 1
    assert exit_code("plan", *words, "dataset.path=gone.jsonl") == 0  # which needs no rows
    assert "a run would be refused: dataset.path: no file gone.jsonl" in capfd.readouterr().out
