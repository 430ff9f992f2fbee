"""Run a sweep from Python, for notebooks."""

import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

from qlora_exp.results import frame
from qlora_exp.utils.errors import ConfigError, SweepError

if TYPE_CHECKING:
    import pandas as pd


def sweep(name: str, *overrides: str, uri: str | None = None) -> "pd.DataFrame":
    """Run every combination of the listed values, as `qlora-exp train -m`, in a process of its own.

    Its output is printed. A sweep of this name that was cut off is resumed, and jobs that are done are not run again.

    Args:
        name: name of the sweep.
        overrides: words of `qlora-exp train -m`, such as `method.r=4,8`.
        uri: MLflow tracking URI. Default: SQLite in ./mlruns.

    Returns:
        The sweep's runs, as `runs` returns them; a job that had been done outside of it is not among them.

    Raises:
        ConfigError: an override is an option of the command line, or sets what `name` or `uri` says.
        SweepError: a job failed, or the sweep was refused; the output says why.
    """
    own = {"sweep.name": "name", "tracking.uri": "uri"}
    for word in overrides:
        if word.startswith("-"):
            raise ConfigError(f"sweep: {word} is an option; give keys and values, such as method.r=4,8")
        if argument := own.get(word.lstrip("+").partition("=")[0]):
            raise ConfigError(f"sweep: {word}: give it as the argument `{argument}`")
    words = [f"sweep.name={name}", *overrides, *([f"tracking.uri={uri}"] if uri else [])]
    command = [sys.executable, "-m", "qlora_exp", "train", "-m", *words]
    # Notebooks ask for colours by FORCE_COLOR; lines that are read here shall have none.
    environment = {key: value for key, value in os.environ.items() if key != "FORCE_COLOR"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", env=environment
    ) as job:
        assert job.stdout is not None
        try:
            for line in job.stdout:
                print(line, end="", flush=True)
        except KeyboardInterrupt:
            job.send_signal(signal.SIGINT)
            job.wait()
            raise
    if job.returncode:
        raise SweepError(f"sweep {name} ended with status {job.returncode}; the output above says why")
    return frame.runs(name, uri=uri)
