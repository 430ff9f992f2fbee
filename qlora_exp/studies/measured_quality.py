"""Find past runs that tell how well ways to train do on a model and a dataset, and compare the best of each."""

from collections import Counter
from collections.abc import Mapping, Sequence

from qlora_exp.config.schema import Config
from qlora_exp.planning.guidance.choice import Measured
from qlora_exp.planning.guidance.knowledge import kind, kind_of
from qlora_exp.results import records
from qlora_exp.results.compare import compare
from qlora_exp.results.record import Record
from qlora_exp.results.verdicts import ALPHA
from qlora_exp.utils.errors import NoRunsError, TrackingError
from qlora_exp.utils.text import shortened

_LENGTH = ("training.max_steps", "training.num_train_epochs", "resolved.global_batch", "data.training_fingerprint")
"""What must be equal beside model and held-out rows."""
_SHOWN = 6


def measured(uri: str | None, configs: Mapping[str, Config]) -> tuple[dict[str, Measured], list[str]]:
    """Return what past runs say of each option, by its name, and what else is to be said of that.

    Runs count that have the model, the dataset and as long a training in common. Of several settings of an option, the
    one with the lowest held-out loss counts. Options are compared with the best one as `qlora-exp compare` does.

    Args:
        uri: MLflow tracking URI. Default: SQLite in ./mlruns.
        configs: configs of the options by name.
    """
    try:
        runs: Sequence[Record] = records.every(uri)
    except NoRunsError:
        return {}, []
    except TrackingError as error:
        return {}, [f"no past run was looked at: {error}"]
    return of_runs(list(reversed(runs)), configs)


def of_runs(runs: Sequence[Record], configs: Mapping[str, Config]) -> tuple[dict[str, Measured], list[str]]:
    """Return the same of these runs, the oldest of which comes first."""
    names = {
        _key(kind(config), config.model.dtype if kind(config) == "full" else ""): name
        for name, config in configs.items()
    }
    config = next(iter(configs.values()))
    wanted = {"model.model_name_or_path": config.model.model_name_or_path, "dataset.path": config.dataset.path}
    groups: dict[tuple[str | None, ...], list[Record]] = {}
    for run in runs:
        same = all(run.params.get(key) == value for key, value in wanted.items())
        if (
            same
            and run.outcome == "ok"
            and "after/loss" in run.metrics
            and _kind(run) in names
            and not run.tags.get("reproduces")
        ):
            shared = *(run.params.get(key) for key in _LENGTH), run.params.get("data.evaluation_fingerprint")
            groups.setdefault(shared, []).append(run)
    if not groups:
        return {}, []
    group = max(reversed(groups.values()), key=lambda members: len({_kind(run) for run in members}))
    best: dict[str, list[Record]] = {}
    tried: Counter[str] = Counter()
    for row in compare(group).rows:
        if (mean := row.mean("after/loss")) is not None:
            what = _kind(row.records[0])
            tried[what] += 1
            if what not in best or mean.value < _mean(best[what]):
                best[what] = row.records
    order = sorted(best, key=lambda what: _mean(best[what]))
    found = {names[order[0]]: Measured(_mean(best[order[0]]), _runs(best[order[0]]), "", worse=False)}
    notes = [f"the best of {count} settings of {names[what]}" for what, count in tried.items() if count > 1]
    if len(order) > 1:
        compared = compare([run for what in order for run in best[what]])
        for row in compared.rows:
            if row is not compared.baseline and row.name in compared.verdicts:
                judged = compared.verdicts[row.name]
                name = names[_kind(row.records[0])]
                text = judged.text.partition(";")[0]
                loss = _mean(row.records)
                found[name] = Measured(loss, _runs(row.records), text, judged.p < ALPHA and judged.difference.value > 0)
        notes += [f"not equal: {line}" for line in compared.warnings]
    return found, notes


def _key(what: str, dtype: str) -> str:
    return f"{what} {dtype}" if dtype in ("float32", "bfloat16") else what


def _kind(run: Record) -> str:
    params = run.params
    dora = any(params.get(f"{section}.use_dora") == "True" for section in ("method", "lora_variant"))
    bits = any(params.get(f"quantization.load_in_{bits}bit") == "True" for bits in (4, 8))
    quantized = bits or params.get("quantization.quant_method", "bitsandbytes") != "bitsandbytes"
    what = kind_of(params.get("method.name", ""), dora, quantized)
    return _key(what, params.get("resolved.dtype", "") if what == "full" else "")


def _mean(runs: Sequence[Record]) -> float:
    return sum(run.metrics["after/loss"] for run in runs) / len(runs)


def _runs(runs: Sequence[Record]) -> list[str]:
    names = [shortened(run.name, 60) for run in runs[:_SHOWN]]
    return [*names, f"and {len(runs) - _SHOWN} more"] if len(runs) > _SHOWN else names
