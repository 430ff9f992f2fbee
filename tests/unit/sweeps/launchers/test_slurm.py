"""Processes that SLURM starts for a job are those of its run. `tests/clusters` runs jobs on a real cluster."""

from pathlib import Path

import pytest

pytest.importorskip("submitit")

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
