"""`train`: pass the command line to Hydra, which composes a run or the jobs of a sweep."""

import argparse
import gc
import io
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

from qlora_exp.cli.failures import exit_code
from qlora_exp.cli.parents import Commands, add_command
from qlora_exp.utils.display import NEWLINES, shown
from qlora_exp.utils.errors import ConfigError
from qlora_exp.utils.quiet import quiet

# Flags with which Hydra only prints something.
_SHOWS_SOMETHING_ELSE = {"--help", "-h", "--hydra-help", "--version", "--shell-completion", "-sc", "--info", "-i"}


def add_parsers(commands: Commands) -> None:
    """Add `train`."""
    parser = add_command(commands, "train", train, add_help=False)  # --help is Hydra's, which lists the config groups
    parser.add_argument("--dry-run", action="store_true")


def train(options: argparse.Namespace) -> None:
    """Fine-tune one configuration, or with -m every combination (a sweep)."""
    gc.disable()  # until the run starts: saves a fifth of the imports' time
    import hydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from qlora_exp.config.hydra_compose import check_command, conf_dir, explain, register
    from qlora_exp.environment.device import refuse_several_processes

    refuse_several_processes()
    words = [*options.unknown, *["sweep.dry_run=true"] * options.dry_run]
    if not (_SHOWS_SOMETHING_ELSE | {"-m", "--multirun"}) & set(words):
        check_command(words)  # a sweep checks all its jobs itself
    register()
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # let Hydra raise its errors, so that we can explain them
    sys.argv = ["qlora-exp train", *words]
    try:
        with _secrets_hidden(any(word in ("-c", "--cfg") or word.startswith("--cfg=") for word in words)):
            hydra.main(config_path=str(conf_dir()), config_name="config", version_base="1.3")(_job)()
    except (HydraException, OmegaConfBaseException) as error:
        raise explain(error) from error
    except OSError as error:
        raise ConfigError(
            f"cannot write to the output folder: {error}; choose another: hydra.run.dir=FOLDER"
        ) from error


@contextmanager
def _secrets_hidden(shows_config: bool) -> Iterator[None]:
    """Print the config that Hydra shows without secrets."""
    if not shows_config:
        yield
        return
    printed = io.StringIO()
    try:
        with redirect_stdout(printed):
            yield
    finally:
        print(shown(printed.getvalue(), keep=NEWLINES), end="")


def _job(composed: Any) -> None:
    """Run what Hydra composed: a job of a sweep, or a single run."""
    from hydra.core.hydra_config import HydraConfig

    from qlora_exp.config.hydra_compose import check
    from qlora_exp.sweeps import jobs
    from qlora_exp.sweeps.worker import run_job

    output_dir = Path(HydraConfig.get().runtime.output_dir)
    os.chdir(HydraConfig.get().runtime.cwd)  # with hydra.job.chdir, MLflow's store and the data would not be found
    quiet()
    if (output_dir / jobs.JOB_FILE).is_file():
        run_job(check(composed), output_dir)
    elif code := exit_code(lambda: _single_run(composed, output_dir)):  # Hydra would print a line before each error
        sys.exit(code)


def _single_run(composed: Any, output_dir: Path) -> None:
    """Run a configuration that is not a job of a sweep."""
    from qlora_exp.config.hydra_compose import check

    try:
        checked = check(composed)
        if checked.sweep.dry_run:
            print(
                "this run is valid; it was not started. Add -m for a sweep, or --cfg job to print the complete config"
            )
            return
        logging.getLogger(__name__).info("starting: loading the libraries takes a few seconds")
        from qlora_exp.recipe.finetune import run
        from qlora_exp.recipe.summary import show

        show(run(checked, output_dir), checked.tracking.uri)
    except KeyboardInterrupt:
        from qlora_exp.training.checkpoints import checkpoints, is_complete

        if any(is_complete(checkpoint) for checkpoint in checkpoints(output_dir / "checkpoints")):
            print(f"to resume: run the same command with hydra.run.dir={output_dir}", file=sys.stderr)
        raise
    finally:
        _remove_if_empty(output_dir)


def _remove_if_empty(folder: Path) -> None:
    """Remove the empty output folder of a run that was refused, and the empty folders around it."""
    kept = {Path.cwd(), *Path.cwd().parents}
    for empty in (folder, *folder.parents):
        if empty in kept or not empty.is_dir() or any(empty.iterdir()):
            return
        empty.rmdir()
