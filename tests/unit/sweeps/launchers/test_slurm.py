"""Processes that SLURM starts for a job are those of its run. `tests/clusters` runs jobs on a real cluster."""

import subprocess
import sys
from pathlib import Path

import pytest
from support import exit_code

pytest.importorskip("submitit")

from qlora_exp.sweeps.launchers import slurm
from qlora_exp.sweeps.launchers.local import Task
from qlora_exp.sweeps.launchers.slurm import run_all
from qlora_exp.utils.errors import ConfigError


@pytest.mark.parametrize(
    ("cluster", "parameters", "processes", "message"),
    [
        ("slurm", {"nodes": 2, "tasks_per_node": 4}, 4, "start 8 processes of a job, and a job here has 4: set dist"),
        ("slurm", {"tasks_per_node": 2}, 1, r"a job here has 1: .* distributed\.num_processes=2"),
        ("local", {"tasks_per_node": 2}, 2, "which only SLURM can do"),
    ],
)
def test_tasks_that_are_not_the_processes_of_a_run_are_refused(cluster, parameters, processes, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        run_all([Task(b"", tmp_path / "job", processes)], cluster, 0, parameters)
    assert not [*Path(tmp_path).iterdir()]


def test_errors_of_processes_beside_the_jobs_go_to_a_file(tmp_path, capfd):
    with slurm._errors_in(tmp_path / "below" / "log"):
        subprocess.run([sys.executable, "-c", "import sys; sys.stderr.write('inside')"], check=True)
    subprocess.run([sys.executable, "-c", "import sys; sys.stderr.write('outside')"], check=True)
    assert capfd.readouterr().err == "outside"
    assert (tmp_path / "below" / "log").read_text() == "inside"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "this machine has no command srun"),
        (["hydra.launcher.cluster=sge"], "hydra.launcher.cluster=sge: choose slurm or local"),
        (["hydra.launcher.parameters.partition=a"], "did you mean 'hydra.launcher.parameters.slurm_partition'?"),
        (["hydra.launcher.time=9"], "did you mean 'hydra.launcher.parameters.timeout_min'?"),
    ],
)
def test_sweep_that_cannot_be_submitted_is_refused_with_what_to_do(words, says, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("qlora_exp.sweeps.hydra_launchers.which", lambda name: None)
    monkeypatch.setattr("sys.argv", ["qlora-exp"])
    assert exit_code("train", "-m", "model=tiny_llama", "method.r=2,4", "hydra/launcher=slurm", *words) == 1
    assert says in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
