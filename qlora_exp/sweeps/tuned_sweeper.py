"""Implement Hydra's sweeper `tuned`: tune each row of a comparison, then train its best values with every seed."""

import logging
from collections.abc import Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.types import Override

from qlora_exp.config.overrides import combinations, of_job
from qlora_exp.config.schema import Config
from qlora_exp.sweeps import jobs, rungs
from qlora_exp.sweeps.hydra_sweepers import (
    JobSweeper,
    few_seeds,
    refuse_idle_keys,
    refuse_settings_of_others,
    require_optuna,
    short,
)
from qlora_exp.utils.display import say
from qlora_exp.utils.errors import ConfigError, SweepError

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from qlora_exp.sweeps.rungs import Rung
    from qlora_exp.sweeps.tuning import Row


class TunedSweeper(JobSweeper):
    """Tunes each combination of the swept values with the same trials, then trains it with every seed."""

    def sweep(self, arguments: list[str]) -> None:
        """Run the trials and the final runs; Hydra calls this with the overrides of the command line."""
        require_optuna("tuned")
        from qlora_exp.sweeps import search, tuning

        overrides = self.parse(arguments)
        refuse_settings_of_others(overrides, "tuned")
        tuned, others, seeds = _parts(overrides, list(self.config.tuning.tuned_keys))
        space = {override.get_key_element(): search.distribution(override) for override in tuned}
        shared = sum(not override.is_sweep_override() for override in others)
        combined = combinations(others)
        self._fixed = of_job(combined[0][:shared])
        chosen = [of_job(words[shared:]) for words in combined]
        finals = [[self.check(self._fixed, [*words, *seed]) for seed in seeds] for words in chosen]
        configs = [config for of_row in finals for config in of_row]
        if few := few_seeds([_swept([*words, *seed]) for words in chosen for seed in seeds]):
            log.warning("%s", few)
        _check(configs)
        refuse_idle_keys(configs, arguments)
        self.try_out(configs)
        settings, how = configs[0].tuning, configs[0].sweep
        folder = self.folder(overrides, how, "tuned")
        trials_folder = folder.with_name(f"{folder.name}_trials")
        steps = rungs.rungs(configs[0], settings)

        def row(words: Sequence[str], config: Config) -> "Row":
            def trial(values: Mapping[str, Any], rung: "Rung") -> jobs.Job:
                shown = [f"{key}={short(value)}" for key, value in values.items()]
                own = [*words, *_assigned(values), *tuning.trial_words(config, rung)]
                return self._job(own, _swept([*words, *shown, rung.length]), trials_folder)

            own = {key: reduce(_part, key.lstrip("+").split("."), config) for key in space}
            fits = all(search.contains(space[key], value) for key, value in own.items())
            return tuning.Row(" ".join(words) or "all", own if fits else {}, trial)

        rows = [row(words, of_row[0]) for words, of_row in zip(chosen, finals, strict=True)]
        trials = [(each, values) for each in rows for values in tuning.proposed(each, space, settings)]
        first, _ = ([each.job(values, rung) for each, values in trials] for rung in (steps[0], steps[-1]))
        with self.begin(trials_folder, how, is_part=True) as running:
            if how.dry_run:
                running.run(first)
                then = [f"{rung.trials} with {rung.length}" for rung in steps[1:]]
                say(f"then for each of {len(rows)} rows: {', '.join([*then, f'{len(seeds)} final runs'])}")
                return
            results = tuning.tune(running, rows, space, steps, settings)
        tuning.write({each.label: result for each, result in zip(rows, results, strict=True) if result}, trials_folder)
        final_jobs = []
        for words, each, result in zip(chosen, rows, results, strict=True):
            if result is not None:
                say(f"{each.label}: {result.text}")
                tags = tuning.tags(result)
                for seed in seeds:
                    swept = _swept([*words, *seed] if len(seeds) > 1 else words)
                    final_jobs.append(self._job([*words, *_assigned(result.values), *seed], swept, folder, tags))
        if final_jobs:
            with self.begin(folder, how) as running:
                running.run(final_jobs)
        if left := [each.label for each, result in zip(rows, results, strict=True) if result is None]:
            raise SweepError(f"{len(left)} of {len(rows)} rows could not be tuned, and were not run: {', '.join(left)}")

    def _job(
        self, words: Sequence[str], swept: Mapping[str, str], folder: Path, tags: Mapping[str, str] | None = None
    ) -> jobs.Job:
        """Make a job of overrides that come after those that all jobs share."""
        return jobs.jobs([self.check(self._fixed, words)], [swept], [[*self._fixed, *words]], folder, tags or {})[0]


def _parts(
    overrides: Sequence[Override], keys: Sequence[str]
) -> tuple[list[Override], list[Override], list[list[str]]]:
    """Return the overrides of tuned keys, those of rows, and the words of each seed.

    Raises:
        ConfigError: a tuned key has no values to try, or another key has an interval.
    """
    tuned = [override for override in overrides if override.key_or_group in keys and override.is_sweep_override()]
    if missing := [key for key in keys if key not in {override.key_or_group for override in tuned}]:
        raise ConfigError(
            f"tuning.tuned_keys: {missing[0]} has no values to try; give them, such as "
            f"'{missing[0]}=tag(log,interval(1e-5,1e-2))'"
        )
    others = [override for override in overrides if override not in tuned and override.key_or_group != "seed"]
    for override in others:
        if override.is_sweep_override() and override.is_interval_sweep():
            named = ",".join([*keys, override.key_or_group])
            raise ConfigError(f"{override.input_line}: only tuned keys have intervals; tuning.tuned_keys=[{named}]")
    return tuned, others, combinations([override for override in overrides if override.key_or_group == "seed"])


def _check(configs: Sequence[Config]) -> None:
    """Refuse settings with which rows would be chosen on what they are compared on."""
    settings, dataset = configs[0].tuning, configs[0].dataset
    if dataset.validation_size is None:
        raise ConfigError(
            "hydra/sweeper=tuned chooses settings on validation rows: set dataset.validation_size, such as 0.1"
        )
    if dataset.evaluate_on is not None:
        raise ConfigError("dataset.evaluate_on: a tuned comparison sets it itself; remove it")
    if settings.seed in (config.seed for config in configs):
        raise ConfigError(
            f"tuning.seed={settings.seed} is also the seed of a final run, which would have been chosen for its luck; "
            "set another one"
        )


def _assigned(values: Mapping[str, Any]) -> list[str]:
    return of_job([f"{key}={value}" for key, value in values.items()])


def _swept(words: Sequence[str]) -> dict[str, str]:
    return dict(word.lstrip("+").split("=", 1) for word in words)


def _part(node: Any, name: str) -> Any:
    """Return a part of a config by name; None if it has none."""
    return node.get(name) if isinstance(node, dict) else getattr(node, name, None)
