"""The commands. Imports nothing heavy until it must: `--help`, `--cfg job` and a wrong config take about a second."""

import atexit
import errno
import gc
import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from qlora_exp.cli.parsers import parser as command_line
from qlora_exp.utils.errors import ConfigError, TimeLimitError, UserError
from qlora_exp.utils.quiet import quiet
from qlora_exp.utils.secrets import redact

# Flags with which Hydra runs nothing and composes no run.
_SHOWS_SOMETHING_ELSE = {"--help", "-h", "--hydra-help", "--version", "--shell-completion", "-sc", "--info", "-i"}


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command; exits with 0, 1 (failed), 2 (wrong usage) or 130 (interrupted)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    atexit.register(gc.freeze)  # at its end Python looks for garbage in all that was imported: 2 s for nothing
    if arguments[:1] == ["train"]:  # Hydra reads the rest by itself
        gc.disable()  # until there is something to run: a fifth of the imports' time
        sys.exit(_guard(lambda: _train(arguments[1:])))
    parser = command_line()
    if arguments[:1] in (["plan"], ["advise"]):  # --vram 24, or as Hydra's overrides are written
        arguments = [f"--{word}" if word.startswith(("vram=", "gpu=", "price=")) else word for word in arguments]
    options, rest = parser.parse_known_args(arguments)
    if rest and hasattr(options, "overrides") and all("=" in word and not word.startswith("-") for word in rest):
        options.overrides += rest  # what comes after an option
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    sys.exit(_guard(lambda: options.command(options)))


def _guard(command: Callable[[], None]) -> int:
    """The exit code of `command`; what the user can mend is shown without a traceback."""
    try:
        command()
    except UserError as error:
        print(f"error: {redact(str(error))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except TimeLimitError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        return 1
    except Exception as error:  # ours to mend: shown whole, but for secrets
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            print(f"error: no space left on the disk of {error.filename or Path.cwd()}", file=sys.stderr)
        elif type(error).__name__ in ("DivergedError", "OutOfMemoryError"):
            print(f"error: {type(error).__name__}: {redact(str(error))}", file=sys.stderr)
        else:
            print(redact("".join(traceback.format_exception(error))), file=sys.stderr)
        return 1
    return 0


def _train(overrides: list[str]) -> None:
    """Hand over to Hydra, which composes and calls `_job`, for a sweep once for each combination."""
    import hydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from qlora_exp.config.hydra_compose import check_command, conf_dir, explain, register
    from qlora_exp.environment.device import refuse_several_processes

    refuse_several_processes()
    overrides = ["sweep.dry_run=true" if word == "--dry-run" else word for word in overrides]
    if not (_SHOWS_SOMETHING_ELSE | {"-m", "--multirun"}) & set(overrides):
        check_command(overrides)  # a sweep checks all its jobs by itself
    register()
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra lets its errors through, and we explain them
    sys.argv = ["qlora-exp train", *overrides]
    try:
        hydra.main(config_path=str(conf_dir()), config_name="config", version_base="1.3")(_job)()
    except (HydraException, OmegaConfBaseException) as error:
        raise explain(error) from error
    except OSError as error:
        raise ConfigError(
            f"cannot write to the output folder: {error}; choose another: hydra.run.dir=FOLDER"
        ) from error


def _job(composed: Any) -> None:
    from hydra.core.hydra_config import HydraConfig

    from qlora_exp.config.hydra_compose import check
    from qlora_exp.sweeps import jobs
    from qlora_exp.sweeps.worker import run_job

    output_dir = Path(HydraConfig.get().runtime.output_dir)
    if (output_dir / jobs.JOB_FILE).is_file():
        checked = check(composed)
        quiet()
        run_job(checked, output_dir)
    elif code := _guard(lambda: _alone(composed, output_dir)):  # Hydra would put a line before each error
        sys.exit(code)


def _alone(composed: Any, output_dir: Path) -> None:
    """A run that is no job of a sweep."""
    from qlora_exp.config.hydra_compose import check

    try:
        checked = check(composed)
        quiet()
        if checked.sweep.dry_run:
            print("nothing is wrong with this run; add -m for a sweep, or --cfg job to see the whole config")
            return
        logging.getLogger(__name__).info("starting: loading the libraries takes a few seconds")
        from qlora_exp.recipe.finetune import run
        from qlora_exp.recipe.summary import show

        show(run(checked, output_dir), checked.tracking.uri)
    except KeyboardInterrupt:
        from qlora_exp.training.checkpoints import checkpoints, is_whole

        if any(is_whole(one) for one in checkpoints(output_dir / "checkpoints")):
            print(f"to go on: the same command with hydra.run.dir={output_dir}", file=sys.stderr)
        raise
    finally:
        _remove_if_empty(output_dir)


def _remove_if_empty(folder: Path) -> None:
    """A refused run leaves nothing behind."""
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
