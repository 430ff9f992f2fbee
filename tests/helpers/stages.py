"""What runs make of a config, stage by stage, as cheaply as it shows what a key changes."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from helpers.planning import CPU, GPU

from qlora_exp.config.schema import Config
from qlora_exp.environment.device import detect, resolve

ROWS: list[dict[str, Any]] = [
    {
        "prompt": f"Question {n}?",
        "answer": f"word{n % 9} " * (n + 3),
        "more": f"context {n}",
        "said": [{"role": "user", "content": f"Hello {n}"}, {"role": "assistant", "content": f"Hi {n}"}] * 2,
    }
    for n in range(18)
]
ROWS += [ROWS[1] | {"answer": "again"}, ROWS[2]]


class Stages:
    """The stages; each returns something that can be compared."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path, tokenizer: Any) -> None:
        self.patch, self.folder, self.tokenizer = monkeypatch, folder, tokenizer
        self.number = 0

    def new_folder(self) -> Path:
        self.number += 1
        folder = self.folder / f"folder{self.number}"
        folder.mkdir()
        return folder

    def resolved(self, config: Config) -> Any:
        return asdict(resolve(config, GPU))

    def tuned(self, config: Config) -> Any:
        from qlora_exp.planning.gpus import Gpu
        from qlora_exp.planning.tuning import planned

        return asdict(planned(config, resolve(config, GPU), Gpu("GPU", 24.0)))

    def planned(self, config: Config) -> Any:
        from qlora_exp.planning.planner import Planner

        prediction = Planner(config, resolve(config, GPU)).predict()
        return prediction.phases, prediction.activations_offloaded

    def device(self, config: Config) -> Any:
        return detect(config.device)

    def arguments(self, config: Config) -> Any:
        from qlora_exp.training.arguments import arguments

        return arguments(config, resolve(config, CPU), Path("out")).to_dict()

    def processes(self, config: Config) -> Any:
        """Which processes share the run, and how they find each other."""
        from qlora_exp.recipe.launch import settings, with_processes

        chosen = vars(settings(with_processes(config).distributed, Path("scratch")))
        return {name: value for name, value in chosen.items() if name != "logs_specs"}

    def optimizer(self, config: Config) -> Any:
        from qlora_exp.models import adapters, base
        from qlora_exp.training.arguments import arguments
        from qlora_exp.training.optimizers import lora_optimizer

        model = base.load_unquantized(config.model)
        adapted = adapters.attach(model, adapters.peft_config(config, model), None)
        optimizer = lora_optimizer(adapted, config.optimizer, arguments(config, resolve(config, CPU), Path("out")))
        if optimizer is None:
            return None
        groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        return repr(groups), [parameter.sum().item() for parameter in parameters]

    def trained(self, config: Config) -> Any:
        """Which parameters are trained."""
        from qlora_exp.models import adapters, base, trained

        model = base.skeleton(config.model)
        trained.freeze(model, config.method)
        return sorted(adapters.trainable_set(model))

    def sampled(self, config: Config) -> Any:
        """Which layers LISA trains in each step."""
        from qlora_exp.models import base
        from qlora_exp.training.lisa import SampledLayers

        model, method = base.skeleton(config.model), config.method
        drawn = SampledLayers(model, method.lisa_activated_layers, method.lisa_interval_steps, config.seed)
        return [drawn.layers(step) for step in range(12)]

    def projected(self, config: Config) -> Any:
        """Which weights an optimizer projects."""
        from qlora_exp.models import base
        from qlora_exp.models.trained import projected_weights

        return projected_weights(base.skeleton(config.model), config.optimizer)

    def early_stopping(self, config: Config) -> Any:
        from qlora_exp.training import trainer

        built: list[Any] = []
        self.patch.setattr(trainer, "Trainer", lambda **given: built.append(given) or SimpleNamespace(
            remove_callback=lambda _: None, add_callback=lambda _: None))  # fmt: skip
        rows = Dataset.from_dict({"input_ids": [[1]], "labels": [[1]]})
        model = SimpleNamespace(named_parameters=list, config=SimpleNamespace(get_text_config=SimpleNamespace))
        trainer.build(model, None, rows, rows, config, resolve(config, CPU), Path("out"), None)
        return [vars(callback) for callback in built[0]["callbacks"]]

    def adapter(self, config: Config) -> Any:
        from qlora_exp.models import adapters, base

        settings = adapters.peft_config(config, base.skeleton(config.model))
        return settings and settings.to_dict()

    def quantizer(self, config: Config) -> Any:
        from qlora_exp.models.quantization import quantization_config

        chosen = quantization_config(config.quantization, resolve(config, CPU))
        return chosen and (type(chosen).__name__, repr(chosen))

    def experts(self, config: Config) -> Any:
        from transformers import AutoConfig, AutoModelForCausalLM

        from qlora_exp.models.builtin import TINY
        from qlora_exp.models.layers.experts import pack_meta, packed_experts

        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model("mixtral", **TINY["mixtral"]))
        pack_meta(model, config.quantization)
        return [name for name, _ in packed_experts(model)]

    def first_rows(self, config: Config) -> Any:
        from qlora_exp.recipe import setup

        asked: list[int] = []
        self.patch.setattr(setup.lora_init, "batches", lambda _, rows, *__: asked.append(rows))
        for name in ("prepare", "finish", "remember"):
            self.patch.setattr(setup.lora_init, name, lambda *_: None)
        self.patch.setattr(setup.adapters, "attach", lambda *_: torch.nn.Module())
        memory = SimpleNamespace(phase=lambda _: nullcontext())
        run = SimpleNamespace(config=config, memory=memory, resolved=resolve(config, CPU), first_adapter=None)
        run.tracker = SimpleNamespace(params=lambda _: None)
        setup._attach(run, SimpleNamespace(train=None, tokenizer=self.tokenizer), None, None)
        return asked

    def first_weights(self, config: Config) -> Any:
        """What the adapter has before training; the folder `trained` has an adapter of this base."""
        from qlora_exp.config.values import to_yaml
        from qlora_exp.models import adapters, base
        from qlora_exp.recipe.saved import first_adapter

        def attached() -> Any:
            torch.manual_seed(0)
            model = base.load_unquantized(config.model)
            return adapters.attach(model, adapters.peft_config(config, model), None)

        trained, folder = attached(), Path("trained")
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.data += 1.0
        trained.save_pretrained(folder)
        (folder / "qlora_exp.yaml").write_text(to_yaml(config))
        (folder / "base.json").write_text('{"version": "code"}')
        adapted = attached()
        if first := first_adapter(config):
            adapters.load_weights(adapted, first.folder)
        return [parameter.sum().item() for parameter in adapted.parameters() if parameter.requires_grad]

    def loading(self, config: Config) -> Any:
        """What transformers is asked for when the model is loaded."""
        from qlora_exp.models import base

        asked: list[Any] = []
        model = SimpleNamespace(config=SimpleNamespace(), named_modules=list)

        def from_pretrained(path: str, **given: Any) -> Any:
            asked.append((path, given))
            return (model, {"missing_keys": []}) if "output_loading_info" in given else model

        stand_in = SimpleNamespace(from_pretrained=from_pretrained)
        self.patch.setattr(base, "AutoConfig", stand_in)
        self.patch.setattr(base, "AutoModelForCausalLM", stand_in)
        base.load_model(config.model, config.quantization, resolve(config, CPU))
        return repr(asked)

    def architecture(self, config: Config) -> Any:
        from qlora_exp.models.base import model_config

        return model_config(config.model).to_dict()

    def rows(self, config: Config) -> Any:
        return self._rows(config, "dataset")

    def unrelated(self, config: Config) -> Any:
        return self._rows(config, "unrelated")

    def _rows(self, config: Config, section: str) -> Any:
        """The rows, and what was asked of the hub for them."""
        from datasets import Dataset

        from qlora_exp.data import rows
        from qlora_exp.data.reading import sources

        asked: list[Any] = []
        load = sources.load_dataset

        def fetch(path: str, *words: Any, **options: Any) -> Any:
            if path != "org/rows":
                return load(path, *words, **options)
            asked.append((words, options))
            found = Dataset.from_list([{**row, "said": [{"role": "user", "content": "a"}]} for row in ROWS])
            return found.to_iterable_dataset() if options["streaming"] else found

        with self.patch.context() as patch:
            patch.setattr(sources, "load_dataset", fetch)
            if section == "unrelated":
                return asked, rows.load_heldout(config.unrelated).to_list()
            loaded = rows.load_rows(config.dataset, config.unrelated)
        leaks = [asdict(leak) for leak in loaded.leaks]
        return asked, loaded.epoch(loaded.train).to_list(), loaded.heldout.to_list(), loaded.dropped, leaks

    def tokens(self, config: Config) -> Any:
        from qlora_exp.data import rows, tokenization

        loaded = rows.load_rows(config.dataset).train
        return tokenization.tokenize(loaded, config, self.tokenizer).to_list()

    def unrelated_tokens(self, config: Config) -> Any:
        from qlora_exp.data import rows, tokenization

        _, tokens = tokenization.unrelated(rows.load_heldout(config.unrelated), config, self.tokenizer)
        return tokens.to_list()

    def evaluated(self, config: Config) -> Any:
        from qlora_exp.data import rows, tokenization
        from qlora_exp.models import base
        from qlora_exp.training import evaluation

        model = base.load_unquantized(config.model)
        loaded = rows.load_rows(config.dataset).heldout
        tokens = tokenization.tokenize(loaded, config, self.tokenizer)
        batches: list[Any] = []
        generate = evaluation.generator(model, self.tokenizer, config.evaluation)
        metrics, samples = evaluation.answers(
            lambda prompts: batches.append(len(prompts)) or generate(prompts), self.tokenizer, loaded, tokens,
            config.evaluation,
        )  # fmt: skip
        return batches, [*metrics], samples

    def scored(self, config: Config) -> Any:
        """Which tasks lm-eval is asked for, and how."""
        import lm_eval.evaluator

        from qlora_exp.training import lm_eval as ours

        tasks = ours.load_tasks(config.evaluation)
        asked: list[Any] = []

        def run(_: Any, given: Any, **options: Any) -> Any:
            asked.append(({name: task.config.num_fewshot for name, task in given.items()}, options))
            return {"results": {}, "samples": {}, "group_subtasks": {}}

        self.patch.setattr(lm_eval.evaluator, "evaluate", run)
        self.patch.setattr("lm_eval.models.huggingface.HFLM", lambda **_: None)
        model = SimpleNamespace(generation_config=SimpleNamespace(stop_strings=["### End"]))
        ours.evaluate(model, None, tasks, config.evaluation, 1)
        assert model.generation_config.stop_strings == ["### End"]  # put back
        return asked

    def labels(self, config: Config) -> Any:
        """What names the run, and what it is compared by."""
        from qlora_exp.config.values import flatten
        from qlora_exp.tracking import lifecycle

        return lifecycle.run_name(config), {key: value for key, value in flatten(config).items() if "name" in key}

    def journal(self, config: Config) -> Any:
        """What a run writes first: names, tags and parameters, and where MLflow is."""
        from qlora_exp.tracking import lifecycle

        folder = self.new_folder()
        with lifecycle.start(config, folder, must_reach=False):
            pass
        start, *rest = [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]
        tags = {key: value for key, value in start["tags"].items() if not key.startswith(("process.", "mlflow."))}
        del tags["attempt"]
        params = [message["values"] for message in rest if message["op"] == "params"]
        return start["experiment"], start["uri"], start["run_name"], tags, params

    def recipe(self, config: Config) -> Any:
        """Which stages a run goes through, and whether its model and plan are logged."""
        from qlora_exp.recipe import context, finetune, measure, save, setup, tokens, train

        calls: list[str] = []

        def note(name: str) -> Callable[..., Any]:
            return lambda *words: calls.append(" ".join([name, *(word for word in words if isinstance(word, str))]))

        @contextmanager
        def opened(*_: Any, **__: Any) -> Iterator[Any]:
            tracker = SimpleNamespace(model=note("model"))
            memory = SimpleNamespace(mark_baseline=lambda: None)
            yield SimpleNamespace(
                config=config, tracker=tracker, memory=memory, resolved=None, saved_model=Path("model"), metrics={},
                log_metrics=lambda _: None, finish=lambda: None,
            )  # fmt: skip

        is_adapter = config.method.peft_type
        trainable = SimpleNamespace(
            peft_config=is_adapter, trainer=SimpleNamespace(state=SimpleNamespace(global_step=1))
        )
        part = Dataset.from_dict({"input_ids": [[1, 2]]})
        self.patch.setattr(finetune, "read_inputs", lambda _: SimpleNamespace(resolved=None, first_adapter=None))
        self.patch.setattr(context, "open_run", opened)
        self.patch.setattr(tokens, "tokenize", lambda *_: SimpleNamespace(train=part, heldout=part))
        self.patch.setattr(tokens, "log_data", lambda *_: None)
        self.patch.setattr(tokens.calibration, "plan_run", lambda *_: note("plan")() or {})
        self.patch.setattr(setup, "build", lambda *_: trainable)
        self.patch.setattr(measure, "measure", note("measure"))
        self.patch.setattr(measure, "log_changes", lambda *_: None)
        self.patch.setattr(train, "train", note("train"))
        self.patch.setattr(save, "save", note("save"))
        self.patch.setattr(save, "model_logged_on_error", lambda *_: nullcontext())
        finetune.run(config, self.folder / "run")
        return calls

    def sweep(self, config: Config) -> Any:
        """How a sweep of one job runs, which failed before."""
        from qlora_exp.planning import screening
        from qlora_exp.sweeps import hydra_launchers, hydra_sweepers, jobs, sweep
        from qlora_exp.tracking.journal import Journal

        named = SimpleNamespace(config=SimpleNamespace(hydra=SimpleNamespace(sweep=SimpleNamespace(dir="multirun"))))
        name = hydra_sweepers.GridSweeper.folder(named, [], config.sweep).name
        folder, asked = self.new_folder(), []
        (job,) = jobs.jobs([config], [{"seed": "1"}], [[]], folder)
        failed = Journal(job.folder)
        start = {"op": "start", "uri": "", "experiment": "", "run_name": "", "timestamp": 1, "tags": {"attempt": "1"}}
        failed.append(start)
        failed.append({"op": "end", "outcome": "error", "status": "FAILED", "timestamp": 1, "metrics": {}})
        failed.close()
        fresh = [
            jobs.Job(job.swept, job.overrides, config, job.parts, name, folder / name) for name in ("new", "newer")
        ]
        self.patch.setattr(screening, "unfit", lambda jobs, vram: asked.append(("unfit", vram)) or [""] * len(jobs))
        self.patch.setattr(sweep, "finished_elsewhere", lambda _: {})
        self.patch.setattr(sweep.Sweep, "_open", lambda self, _: setattr(self, "_parent", SimpleNamespace(run_id=1)))

        def launch(waiting: Any, more: Any) -> Any:
            for one in waiting:
                made = json.loads((one.folder / jobs.JOB_FILE).read_text())
                asked.append(
                    ("launched", one.key.startswith("new"), made["fail_fast"], made["time_limit"], made["group"])
                )
            return [None] * len(waiting)

        sweep.Sweep(folder, config.sweep, launch).run([job, *fresh])
        self.patch.setattr(hydra_launchers.local, "run_groups", lambda _, count, *__: asked.append(("at once", count)))
        hydra_launchers.LocalLauncher.run_all(SimpleNamespace(config=config), [], None, None, None)
        return name, asked

    def search(self, config: Config) -> Any:
        """What Optuna proposes, and by what it judges."""
        from optuna.distributions import FloatDistribution

        from qlora_exp.sweeps import search

        asked: list[Any] = []
        stand_in = SimpleNamespace(
            folder=self.new_folder(), register=lambda _: None,
            run=lambda _, pruning, *__: asked.append([each["pruner"] for each in pruning.values()]),
            ended=lambda job: {"outcome": "ok", "metrics": {"after/loss": job.x, "after/rougeL": 1.0}},
        )  # fmt: skip
        space = {"x": FloatDistribution(0.0, 1.0)}
        drawn: list[float] = []

        def jobs_of(values: Any) -> Any:
            drawn.append(values["x"])
            return [SimpleNamespace(key="k", x=values["x"], folder=Path())]

        best = search.search(stand_in, space, jobs_of, config.search, config.sweep)
        return asked, drawn, [(trial.params, trial.values) for trial in best]

    def tuning(self, config: Config) -> Any:
        """Which trials a tuned row gets, and which of them wins."""
        from optuna.distributions import FloatDistribution

        from qlora_exp.sweeps import rungs, tuning

        space = {key: FloatDistribution(0.0, 1.0) for key in config.tuning.tuned_keys}
        asked: list[Any] = []

        def ended(job: Any) -> Any:
            metrics = {"after/loss": job.x, "after/rougeL": (job.x - 0.5) ** 2}
            return {"outcome": "ok", "seconds": 1.0, "metrics": metrics}

        stand_in = SimpleNamespace(folder=self.new_folder(), run=lambda jobs: asked.append(len(jobs)), ended=ended)
        steps = rungs.rungs(config.model_copy(update={"training": SimpleNamespace(max_steps=9)}), config.tuning)

        def job(values: Any, rung: Any) -> Any:
            return SimpleNamespace(x=next(iter(values.values())), words=tuning.trial_words(config, rung), folder=Path())

        row = tuning.Row("row", {}, job)
        (tuned,) = tuning.tune(stand_in, [row], space, steps, config.tuning)
        return asked, tuned, job({"x": 1.0}, steps[0]).words
