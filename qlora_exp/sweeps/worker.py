"""Run one job of a sweep, in the process that a launcher started for it."""

import gc
import json
import logging
import sys
from collections.abc import Mapping
from pathlib import Path

from qlora_exp.config.schema import Config
from qlora_exp.data.reading.recognize import recognized
from qlora_exp.environment import turns
from qlora_exp.environment.ranks import ranks, take_place
from qlora_exp.sweeps.jobs import JOB_FILE, TIME_LIMIT_FILE, stop, stopped
from qlora_exp.tracking import run_key
from qlora_exp.tracking.journal import last_message
from qlora_exp.utils.errors import ConfigError, JournalError, PrunedError, TimeLimitError, UserError
from qlora_exp.utils.processes.signals import handle_signals, time_limit

log = logging.getLogger(__name__)


def run_job(config: Config, folder: Path) -> None:
    """Run one job of a sweep in this process.

    Its outcome is recorded in its journal; an error is not raised.

    Args:
        config: config of the job.
        folder: folder of the job.

    Raises:
        SystemExit: the job was interrupted.
    """
    job = json.loads((folder / JOB_FILE).read_text("utf-8"))
    if job["fail_fast"] and stopped(folder.parent):
        return
    if "torch" not in sys.modules:  # nothing has loaded the libraries in this process yet
        gc.disable()  # until the run starts: saves a fifth of the imports' time
    from qlora_exp.recipe.finetune import run
    from qlora_exp.recipe.summary import show
    from qlora_exp.tracking import lifecycle

    take_place(config.distributed)
    main = ranks().is_main  # else another process of the run, which SLURM started
    try:
        config = recognized(config)
        _check_unchanged(config, job["parts"])
        limit = time_limit if turns.current() is None else turns.time_limit
        with handle_signals(), limit(job["time_limit"] if main else None, folder / TIME_LIMIT_FILE):
            result = run(config, folder, job["tags"], must_reach=False, pruning=job["pruning"])
        if main and job["pruning"]:
            from qlora_exp.training import pruning  # needs the extra `optuna`

            pruning.tell(job["pruning"], result.metrics["after/loss"])
        if main:
            show(result, config.tracking.uri)
    except PrunedError as error:
        log.info("pruned: %s", error)
    except KeyboardInterrupt:  # already recorded as killed
        raise SystemExit(130) from None
    except (Exception, TimeLimitError) as error:  # a failure is a result: record it and let the other jobs run
        log.error("error: %s: %s", type(error).__name__, error)  # noqa: TRY400
        try:
            if (
                main and not isinstance(error, JournalError) and last_message(folder) is None
            ):  # it failed before its run began
                lifecycle.record_failure(config, folder, job["tags"], error)
        except (OSError, UserError) as second:  # the disk may be full: the sweep sees that the job did not end
            log.error("error: it cannot be recorded: %s", second)  # noqa: TRY400
        if job["fail_fast"]:
            stop(folder.parent)


def _check_unchanged(config: Config, planned: Mapping[str, str]) -> None:
    """Refuse a job whose run key no longer matches its work, e.g. because the data changed since the sweep began."""
    if changed := [part for part, digest in run_key.digests(config).items() if digest != planned[part]]:
        raise ConfigError(f"not the same {', '.join(changed)} any more as when the sweep began; start the sweep again")
