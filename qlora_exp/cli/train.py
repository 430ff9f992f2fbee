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
from typing import TYPE_CHECKING, Any

from qlora_exp.cli.failures import exit_code, full_disk_named
from qlora_exp.cli.parents import Commands, add_command
from qlora_exp.utils.display import NEWLINES, shown
from qlora_exp.utils.errors import ConfigError
from qlora_exp.utils.files import remove_if_empty
from qlora_exp.utils.quiet import quiet

if TYPE_CHECKING:
    from qlora_exp.config.schema import Config

log = logging.getLogger(__name__)

_SHOWN = 2000
"""Characters of a row that --dry-run shows."""


def add_parsers(commands: Commands) -> None:
    """Add `train`."""
    parser = add_command(commands, "train", train, add_help=False)  # --help is Hydra's, which lists the config groups
    parser.add_argument("--dry-run", action="store_true")


def train(options: argparse.Namespace) -> None:
    """Fine-tune one configuration, or with -m every combination (a sweep)."""
    gc.disable()  # until the run starts: saves a fifth of the imports' time
    from qlora_exp.config import hydra_compose
    from qlora_exp.config.conf_folder import conf_dir
    from qlora_exp.config.overrides import readable
    from qlora_exp.environment.ranks import is_launched
    from qlora_exp.libraries import hydra

    sys.argv = ["qlora-exp train", *options.unknown, *["sweep.dry_run=true"] * options.dry_run]
    arguments = hydra.parse(sys.argv[1:])
    _refuse_flags(arguments)
    shows_config = arguments.cfg is not None
    if not arguments.shell_completion:  # its last word may be a part of an override
        arguments.overrides = readable(arguments.overrides)
    if not (arguments.help or arguments.hydra_help or arguments.shell_completion or arguments.info):
        is_sweep = any(word.startswith(("sweep=", "hydra.mode=MULTIRUN")) for word in arguments.overrides)
        arguments.multirun |= is_sweep and not (shows_config or arguments.run)
        if arguments.multirun:  # a sweep checks its jobs itself
            if is_launched():
                raise ConfigError(
                    "a launcher (torchrun, accelerate launch, srun) started this process as one of several; start a "
                    "sweep without a launcher: its jobs start their own processes (distributed.num_processes)"
                )
            if arguments.config_dir is not None:
                hydra_compose.check_own_options(Path(arguments.config_dir))
        else:
            hydra_compose.check_command(arguments.overrides, arguments.config_dir, shows_config)
    hydra_compose.register()
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # let Hydra raise its errors, so that we can explain them
    try:
        with hydra_compose.errors_explained(), _secrets_hidden(shows_config):
            hydra.main(arguments, _job, conf_dir(), "config")
    except OSError as error:
        key = "hydra.sweep.dir" if arguments.multirun else "hydra.run.dir"
        raise ConfigError(f"cannot write to the output folder: {error}; choose another: {key}=FOLDER") from error


def _refuse_flags(arguments: argparse.Namespace) -> None:
    """Refuse flags of Hydra that do not go together, or that this command does not support."""
    if arguments.experimental_rerun is not None:
        raise ConfigError("--experimental-rerun is not supported; to repeat a run: qlora-exp reproduce RUN")
    alternatives = ("run", "multirun", "cfg", "info", "shell_completion")
    given = [f"--{name.replace('_', '-')}" for name in alternatives if getattr(arguments, name)]
    if len(given) > 1:
        raise ConfigError(f"{' and '.join(given)}: give one of them")
    if (arguments.resolve or arguments.package) and not (arguments.cfg or arguments.help):
        raise ConfigError("--resolve and --package are about the config that --cfg prints: add --cfg job")
    if "${" in str(Path.cwd()):
        raise ConfigError(f"Hydra does not accept a working folder with ${{ in its path: {Path.cwd()}")


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
    from qlora_exp.data.reading.recognize import recognized

    try:
        checked = recognized(check(composed))
        if checked.sweep.dry_run:
            _dry_run(checked)
            return
        log.info("starting: loading the libraries takes a few seconds")
        from qlora_exp.environment.ranks import ranks
        from qlora_exp.recipe.finetune import run
        from qlora_exp.recipe.summary import show

        with full_disk_named(output_dir):
            result = run(checked, output_dir)
        if ranks().is_main and checked.distributed.machine_rank == 0:
            show(result, checked.tracking.uri)
    except KeyboardInterrupt:
        from qlora_exp.training.checkpoints import checkpoints, is_complete

        if any(is_complete(checkpoint) for checkpoint in checkpoints(output_dir / "checkpoints")):
            print(f"to resume: run the same command with hydra.run.dir={output_dir}", file=sys.stderr)
        elif output_dir.is_dir() and any(output_dir.iterdir()):  # a run that is refused leaves nothing
            print(
                "no checkpoint was saved, so the run would begin again; to save some: training.save_strategy=steps "
                "training.save_steps=20",
                file=sys.stderr,
            )
        raise
    finally:
        remove_if_empty(output_dir)


def _dry_run(config: "Config") -> None:
    """Do what a run does before it loads weights, and show what it would learn."""
    from qlora_exp.environment import hub
    from qlora_exp.recipe.inputs import check_config, read_inputs
    from qlora_exp.recipe.launch import with_processes

    config = with_processes(config)
    check_config(config)
    if hub.is_needed(config) and hub.is_offline():
        print("the config is valid here, if what it needs of the hub is in the hub's cache; nothing is started")
        return
    print("the config is valid here; nothing is started. Add -m for a sweep, or --cfg job to print the whole config")
    print("reading the rows (Ctrl+C skips that) ...", file=sys.stderr)
    inputs = read_inputs(config)
    from qlora_exp.recipe.tokens import describe, planned, tokenize  # import torch, which takes seconds
    from qlora_exp.recipe.tune import tune

    tokens = tokenize(config, inputs)
    resolved = tune(config, inputs, tokens).resolved
    describe(config, inputs, tokens)
    if resolved.tuned:
        log.info("training.tune: %s", resolved.tuned)
    planned(config, resolved, tokens)
    print("\nthe first row, as the model reads it; [[what is in double brackets]] is learned:")
    for name, audit in tokens.audits.items():
        print(f"\n{f'{name}: ' if len(tokens.audits) > 1 else ''}{_excerpt(shown(audit.sample, keep=NEWLINES))}")


def _excerpt(row: str) -> str:
    """Return a row as it is, or of a long one the beginning and what is around the first mark."""
    if len(row) <= _SHOWN:
        return row
    begin = max(_SHOWN // 4, row.find("[[") - _SHOWN // 4)
    end = begin + 3 * _SHOWN // 4
    left_out = f" ... {begin - _SHOWN // 4:,} characters ... " if begin > _SHOWN // 4 else ""
    more = f" ... and {len(row) - end:,} more characters" if end < len(row) else ""
    return f"{row[: _SHOWN // 4]}{left_out}{row[begin:end]}{more}"
