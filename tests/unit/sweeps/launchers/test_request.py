"""Processes that SLURM starts for a job are those of its run, and each has a GPU."""

from typing import Any

import pytest
from support import exit_code

from qlora_exp.sweeps.launchers import request
from qlora_exp.utils.errors import ConfigError


@pytest.fixture
def job(make_config):
    """Make the config of a job with so many processes."""

    def make(processes: int, *words: str):
        shared = ["distributed=ddp", f"distributed.num_processes={processes}"] if processes > 1 else []
        return make_config("method=lora", *shared, *words)

    return make


@pytest.mark.parametrize(
    ("cluster", "parameters", "processes", "message"),
    [
        ("slurm", {"nodes": 2, "tasks_per_node": 4}, 4, "start 8 processes of a job, and a job here has 4: set dist"),
        ("slurm", {"tasks_per_node": 2}, 1, r"a job here has 1: .* distributed\.num_processes=2"),
        ("local", {"tasks_per_node": 2}, 2, "which only SLURM can do"),
        (
            "slurm",
            {"gpus_per_node": 2},
            4,
            "a job here has 4 processes on a node, .* set it to 4, or .*num_processes=2",
        ),
        ("slurm", {"nodes": 2, "tasks_per_node": 2, "gpus_per_node": 1}, 4, "has 2 processes .*num_processes=2"),
    ],
)
def test_requests_that_do_not_fit_the_processes_of_a_run_are_refused(job, cluster, parameters, processes, message):
    with pytest.raises(ConfigError, match=message):
        request.check(job(processes, "device=auto"), cluster, parameters)


@pytest.mark.parametrize(
    ("words", "cluster", "parameters", "warns"),
    [
        ([], "slurm", {}, True),
        ([], "slurm", {"gpus_per_node": 1}, False),
        ([], "slurm", {"gpus_per_node": "a100:1"}, False),
        ([], "slurm", {"slurm_additional_parameters": {"gres": "gpu:1"}}, False),
        ([], "slurm", {"slurm_gpus_per_task": 1}, False),
        ([], "slurm", {"slurm_gres": "gpu:1"}, False),
        ([], "slurm", {"gpus_per_node": 0, "slurm_gres": None}, True),
        ([], "slurm", {"slurm_partition": "gpu", "slurm_setup": ["module load gpu"]}, True),
        (["device=cpu"], "slurm", {}, False),
        ([], "local", {}, False),
    ],
)
def test_jobs_that_ask_for_no_gpu_are_warned_of(job, words, cluster, parameters: dict[str, Any], warns: bool):
    found = request.check(job(1, *(words or ["device=auto"])), cluster, parameters)
    assert bool(found) is warns
    assert not warns or "gpus_per_node=1" in found


@pytest.mark.parametrize(("count", "says"), [(0, "is not queued again"), (3, "is queued again, at most 3 times")])
def test_what_jobs_ask_for_is_said(count: int, says: str):
    parameters = {"timeout_min": 240, "nodes": None, "slurm_additional_parameters": {}}
    said = request.described({"parameters": parameters, "max_num_timeout": count})
    assert said == f"each job asks for timeout_min=240; at its time limit it {says} (hydra.launcher.max_num_timeout)"


def test_dry_run_says_what_jobs_would_ask_for_and_refuses_what_cannot_be(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["qlora-exp"])
    words = ["train", "-m", "model=tiny_llama", "seed=1,2", "hydra/launcher=slurm", "sweep.dry_run=true"]
    assert exit_code(*words, "hydra.launcher.parameters.gpus_per_node=1") == 0
    assert "each job asks for timeout_min=1440 gpus_per_node=1" in "".join(capsys.readouterr())
    more = ["hydra.launcher.parameters.gpus_per_node=2", "distributed=ddp", "distributed.num_processes=4"]
    assert exit_code(*words, *more) == 1
    assert "has 4 processes on a node" in capsys.readouterr().err
