"""Processes that SLURM starts for a job are those of its run. `tests/clusters` runs jobs on a real cluster."""

import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import cloudpickle
import pytest
from support import exit_code

pytest.importorskip("submitit")

from submitit.core.utils import UncompletedJobError

from qlora_exp.sweeps.launchers import slurm
from qlora_exp.utils.processes import signals


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


def test_a_job_that_is_not_queued_again_at_the_time_limit_is_interrupted(tmp_path):
    previous, file = signal.getsignal(signal.SIGUSR2), tmp_path / "told"

    def told() -> list[int]:
        return [*map(int, file.read_text().split())]

    def out_of_time(number, frame):
        with file.open("a") as lines:
            lines.write(f"{os.getpid()}\n")
        os.kill(os.getpid(), signal.SIGUSR2)  # SLURM may send it twice
        if len(told()) == 1:
            return  # not the first of the job's processes
        raise UncompletedJobError("Job not requeued because: timed-out too many times.")

    def job() -> None:
        if not (child := os.fork()):  # SLURM tells it too
            os.kill(os.getpid(), signal.SIGUSR2)
            os._exit(7)
        assert os.waitpid(child, 0)[1] >> 8 == 7
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGUSR2)
        pytest.fail("it went on")

    try:
        signal.signal(signal.SIGUSR2, out_of_time)
        with pytest.raises(KeyboardInterrupt):
            slurm._Call()(cloudpickle.dumps(job))
        assert told() == [os.getpid()] * 2
        signal.signal(signal.SIGUSR2, lambda *_: sys.exit(-1))  # it is queued again
        with pytest.raises(SystemExit):
            slurm._Call()(cloudpickle.dumps(job))
    finally:
        signal.signal(signal.SIGUSR2, previous)


def test_a_job_that_trains_is_ended_by_submitit_after_its_checkpoint():
    previous, order = signal.getsignal(signal.SIGUSR2), []

    def queue_again(*_: object) -> None:
        order.append("queued again")
        sys.exit(-1)

    try:
        signal.signal(signal.SIGUSR2, queue_again)
        slurm._save_at_time_limit()
        with pytest.raises(SystemExit), signals.checkpoint_first():
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGUSR2)
            assert signals.is_ending()
            order.append("checkpoint")
    finally:
        signal.signal(signal.SIGUSR2, previous)
    assert order == ["checkpoint", "queued again"]
    assert not signals.is_ending()


@pytest.mark.parametrize(
    ("state", "outcome", "says"),
    [
        ("TIMEOUT", "killed", "the cluster's time limit is over"),
        ("OUT_OF_MEMORY", "oom", "OUT_OF_MEMORY (job 7)"),
        ("NODE_FAIL", "killed", "the process died: NODE_FAIL"),
    ],
)
def test_what_the_cluster_ended_is_told_by_its_state(state: str, outcome: str, says: str):
    ended = SimpleNamespace(exception=lambda: UncompletedJobError("no output"), state=state, job_id=7)
    ending = slurm._ending(ended)
    assert ending.outcome == outcome
    assert says in ending.failure
