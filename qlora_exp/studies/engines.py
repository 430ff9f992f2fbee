"""Test a method with two processes: whether they train what one process with the batch of both does.

`nox -s compatibility` writes the results to `compatibility.json`. Each test is two complete runs of a tiny model on
this machine's CPU.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from qlora_exp.config.schema import Config
from qlora_exp.config.tables import compatibility
from qlora_exp.config.tables.compatibility import DIFFERS, ENGINES, WORKS
from qlora_exp.environment.ranks import is_launched, ranks
from qlora_exp.recipe.finetune import run
from qlora_exp.recipe.launch import launch
from qlora_exp.recipe.result import RunResult
from qlora_exp.studies.probe import FailedError, trial_config
from qlora_exp.tracking.journal import metrics
from qlora_exp.utils.errors import RankError, type_and_first_line
from qlora_exp.utils.processes.workers import write_into

_ROUNDING = 1e-5
"""Greatest relative difference between sums in another order."""
_GROWN = 1e-3
"""The same of gradients and weights after some steps, where rounding grows: most with FourierFT, in one process too."""
_RUN = [
    "dataset.max_train_rows=16",
    "dataset.max_eval_rows=4",
    "training.max_steps=3",
    "training.per_device_train_batch_size=2",
    "training.eval_strategy=no",
    "optimizer.adam_epsilon=1e-3",  # else the rounding of small gradients would grow
    "training.learning_rate=1e-3",
    "unrelated.eval_size=2",
    "evaluation.generate_rows=2",
    "evaluation.max_new_tokens=4",
    "tracking.plan=false",
    "tracking.log_adapter=false",
]
_BY_PROCESS = {
    "LILY": "its router averages over the rows of a process",
    "PVERA": "each process samples by itself",
    "LORA+eva": "its initialization reads the rows in batches of one process",
    "LORA+lora_ga": "its initialization reads the rows in batches of one process",
    "LORA+monteclora": "each process samples by itself",
    "LORA+velora": "it averages over the first batch of a process",
}
"""Methods that cannot give with several processes what they give with one, and why."""


def engine_verdicts(words: Sequence[str], base: str, folder: Path, engines: Sequence[str] = ENGINES) -> dict[str, str]:
    """Test a method with two processes on one kind of base.

    Args:
        words: overrides that select the method.
        base: one of BASES.
        folder: folder for the runs and their MLflow store, which the tests of other methods may share.
        engines: which of ENGINES to test.

    Returns:
        For each engine `works`, or the reason why it does not. The reason starts with `compatibility.DIFFERS` if the
        processes train, but by the method's own rules otherwise than one process.
    """
    name = "-".join([*words, base]).replace("=", "_")
    with compatibility.ignored():
        config = trial_config(words, base, *_RUN, f"tracking.uri=sqlite:///{folder}/mlflow.db")
        batch = config.training.per_device_train_batch_size
        whole = config.training.model_copy(update={"per_device_train_batch_size": 2 * batch})
        one = _run(config.model_copy(update={"training": whole}), folder / f"{name}-one")
    reason = _BY_PROCESS.get(compatibility.kind_of(config.method.kind, config.lora_variant.name))
    results: dict[str, str] = {}
    for engine in engines:
        shared = config.distributed.model_copy(update={"engine": engine, "num_processes": 2, "ddp_timeout": 60})
        arguments: dict[str, Any] = {"tags": {}, "must_reach": True, "pruning": None}
        try:
            two = launch(
                _run,
                config.model_copy(update={"distributed": shared}),
                output_dir=folder / f"{name}-{engine}",
                **arguments,
            )
            _check_saved(two, one)
            if reason is None:
                check_same(two, one)
            results[engine] = WORKS if reason is None else DIFFERS + reason
        except FailedError as error:
            results[engine] = str(error)
        except RankError as error:
            results[engine] = re.sub(r"process \d+", "process", error.why)[:120]
        except Exception as error:  # any error that a library raises is a result
            results[engine] = type_and_first_line(error, 120)
    return results


def _run(config: Config, output_dir: Path, **arguments: Any) -> RunResult:
    """Run what may be refused; each process of a run calls this."""
    if is_launched() and ranks().is_main:
        write_into(output_dir / "output.log")
    with compatibility.ignored():
        return run(config, output_dir, **arguments)


def _weights(result: RunResult) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for file in (result.output_dir / "model").glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }


def _check_saved(two: RunResult, one: RunResult) -> None:
    """Check that the same tensors are saved."""
    if differing := _weights(two).keys() ^ _weights(one).keys():
        raise FailedError(f"{len(differing)} tensors are saved by one process only or by two only ({min(differing)})")


def check_same(two: RunResult, one: RunResult) -> None:
    """Check that two runs have the same losses, norms of gradients and trained weights, up to rounding.

    Raises:
        FailedError: they differ; the message says what differs first.
    """
    others = _measured(two)
    for name, value in _measured(one).items():
        limit = _GROWN if "grad_norm" in name else _ROUNDING
        if not abs(others.get(name, float("inf")) - value) <= limit * abs(value):
            raise FailedError(f"two processes do not train as one ({name}: {others.get(name)}, not {value})")
    weights = _weights(two)
    for name, tensor in _weights(one).items():
        other, whole = weights[name].float(), tensor.float()
        if other.shape != whole.shape or not (other - whole).norm() <= _GROWN * whole.norm():
            raise FailedError(f"two processes do not train as one ({name} differs)")


def _measured(result: RunResult) -> dict[str, float]:
    curves = {
        f"{name} of step {line['step']}": line[name]
        for line in metrics(result.output_dir)
        for name in ("train/loss", "train/grad_norm")
        if name in line
    }
    names = ("before/loss", "after/loss", "after/unrelated_loss", "trainable_parameters")
    return curves | {name: result.metrics[name] for name in names if name in result.metrics}
