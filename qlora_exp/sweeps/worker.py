"""Run one job of a sweep, in whichever process it was launched."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path

from qlora_exp.config.schema import Config
from qlora_exp.sweeps.jobs import JOB_FILE, LATE_FILE, stop, stopped
from qlora_exp.tracking import run_key
from qlora_exp.tracking.journal import last_message
from qlora_exp.utils.errors import ConfigError, JournalError, PrunedError, TimeLimitError
from qlora_exp.utils.signals import heeded, time_limit

log = logging.getLogger(__name__)


def run_job(config: Config, folder: Path) -> None:
    """One job, in whichever process it was launched; its end is in its journal, and nothing is raised but an exit."""
    given = json.loads((folder / JOB_FILE).read_text("utf-8"))
    if given["fail_fast"] and stopped(folder.parent):
        return
    from qlora_exp.recipe.finetune import run
    from qlora_exp.recipe.summary import show
    from qlora_exp.tracking import lifecycle

    try:
        _check_unchanged(config, given["parts"])
        with heeded(), time_limit(given["time_limit"], folder / LATE_FILE):
            result = run(config, folder, given["tags"], must_reach=False, pruning=given["pruning"])
        show(result, config.tracking.uri)
    except PrunedError as error:
        log.info("pruned: %s", error)
    except KeyboardInterrupt:  # recorded as killed
        raise SystemExit(130) from None
    except (Exception, TimeLimitError) as error:  # a job's failure is a result: recorded, and the other jobs go on
        if not isinstance(error, JournalError) and last_message(folder) is None:  # it did not come as far as its run
            lifecycle.record_failure(config, folder, given["tags"], error)
        log.error("error: %s: %s", type(error).__name__, error)  # noqa: TRY400
        if given["fail_fast"]:
            stop(folder.parent)


def _check_unchanged(config: Config, planned: Mapping[str, str]) -> None:
    """Refuse a job that would not do the work that its key stands for, e.g. because the data were edited meanwhile."""
    if changed := [part for part, digest in run_key.parts(config).items() if digest != planned[part]]:
        raise ConfigError(f"not the same {', '.join(changed)} any more as when the sweep began; start it again")
