"""One run, start to end: the recipe. The only module that knows all the others.

    rows -> tokens and label audit -> base model -> adapter -> evaluation -> training -> saved -> evaluation -> tracked

Whatever can be refused is refused before the weights are loaded.
"""

import gc
import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from copy import copy
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any

from qlora_exp.config.peft_methods import moves_base
from qlora_exp.config.schema import Config
from qlora_exp.recipe.result import RunResult
from qlora_exp.tracking.journal import CONFIG_FILE
from qlora_exp.training.checkpoints import checkpoints
from qlora_exp.utils.errors import ConfigError, DataError
from qlora_exp.utils.quiet import hide_bars
from qlora_exp.utils.secrets import RedactingFormatter, load_env_file
from qlora_exp.utils.signals import heeded

log = logging.getLogger(__name__)


def run(
    config: Config,
    output_dir: str | Path,
    tags: Mapping[str, str] = MappingProxyType({}),
    must_reach: bool = True,
    pruning: Mapping[str, Any] | None = None,
) -> RunResult:
    """Train, measure and track one configuration.

    Args:
        config: from `compose`.
        output_dir: where its files go: journal, log, checkpoints, the trained adapter. A run that was cut off there
            goes on from its newest checkpoint.
        tags: of the MLflow run, beside the config's.
        must_reach: refuse to begin while MLflow does not answer; false tells it later.
        pruning: how to ask a search whether to go on (`training.pruning.judge`).

    Raises:
        UserError: something that the user can mend; the message says what.
        DivergedError: the loss is not a number any more.
        PrunedError: the search that the run belongs to has seen enough.
    """
    from qlora_exp.environment import hub
    from qlora_exp.environment.device import (
        autocast,
        computes_in,
        detect,
        places,
        refuse_several_processes,
        resolve,
        take,
    )

    refuse_several_processes()
    for section, source in (("dataset", config.dataset), ("unrelated", config.unrelated)):
        for file in source.files:
            if not file.is_file():
                raise DataError(f"{section}.path: no file {file} in {Path.cwd()}")
    load_env_file()
    if hub.is_needed(config):
        hub.go_offline_if_unreachable()  # before huggingface_hub is imported
    # The rows come first, then the device: what is wrong there is found before the slower imports, and leaves no run.
    from qlora_exp.data import dataset, label_audit, sources
    from qlora_exp.training import lm_eval

    rows = dataset.load_rows(config.dataset)
    unrelated = dataset.load_heldout(config.unrelated) if config.unrelated.paths else None
    tasks = lm_eval.load_tasks(config.evaluation) if config.evaluation.lm_eval_tasks else None
    score = sources.scorer(config.dataset)

    resolved = resolve(config, detect(config.device, bitsandbytes=config.quantization.bitsandbytes))
    take(resolved)
    import torch
    from transformers import set_seed

    from qlora_exp.data import prompts
    from qlora_exp.environment import efficiency, provenance
    from qlora_exp.environment.memory import MemoryMonitor, reuse_freed_memory
    from qlora_exp.models import adapters, lora_init
    from qlora_exp.models import base as model
    from qlora_exp.planning import calibration
    from qlora_exp.recipe import summary
    from qlora_exp.tracking import run_key
    from qlora_exp.tracking import tracker as tracking
    from qlora_exp.training import evaluation
    from qlora_exp.training import trainer as training
    from qlora_exp.utils.files import size_on_disk

    if not gc.isenabled():  # the command line starts without, and what it imported is never garbage
        gc.enable()
        gc.freeze()
    hide_bars()
    output_dir = _writable(output_dir)
    with (
        _logging_to(output_dir / tracking.LOG_FILE),
        heeded(),
        tracking.start(config, output_dir, tags, must_reach) as tracker,
        ExitStack() as at_the_end,
    ):
        log.info("run %s in %s on %s", tracker.run_id, output_dir, resolved.place)
        if resolved.optim_fallback:
            log.info("optimizer %s: %s", resolved.optim, resolved.optim_fallback)
        tracker.params({f"resolved.{key}": value for key, value in asdict(resolved).items() if value is not None})
        tracker.tags({f"hardware.{key}": value for key, value in provenance.hardware().items()})
        reuse_freed_memory()
        peak_flops = efficiency.peak_flops(resolved.device, computes_in(resolved))
        metrics: dict[str, float] = {}

        def note(values: Mapping[str, float]) -> None:
            metrics.update(values)
            tracker.metrics(values)

        # Tokens, refused early.
        tokenizer = model.load_tokenizer(config.model)
        train_tokens = dataset.tokenize(rows.train, config, tokenizer)
        audit = label_audit.audit(train_tokens, config.training.max_length, tokenizer)
        heldout, heldout_tokens = dataset.cut(
            rows.heldout, dataset.tokenize(rows.heldout, config, tokenizer), config.training.max_length
        )
        tracker.json(asdict(audit) | {"left_out": rows.dropped}, "label_audit.json")
        if rows.leaks:
            near = sum(one.kind == "near" for one in rows.leaks)
            log.warning(
                "leaks: %d training rows ask what a held-out row asks, %d more are like one (leaks.json); %d left out",
                len(rows.leaks) - near,
                near,
                rows.dropped["leaks"],
            )
            tracker.json([asdict(one) for one in rows.leaks], "leaks.json")
        note({f"leaks/{kind}": sum(one.kind == kind for one in rows.leaks) for kind in ("exact", "near")})
        log.info(
            "labels: %.0f%% of %s tokens carry loss; %.0f%% of rows are cut, EOS is learned in %.0f%%",
            100 * audit.supervised_share,
            f"{audit.tokens:,}",
            100 * audit.truncated_rows_share,
            100 * audit.eos_learned_share,
        )
        note({f"labels/{key}": value for key, value in asdict(audit).items() if not isinstance(value, str)})
        parts = [("training", config.dataset, rows.train), ("evaluation", config.dataset, heldout)]
        unrelated_tokens = None
        if unrelated is not None:
            unrelated, unrelated_tokens = dataset.unrelated(unrelated, config, tokenizer)
            parts.append(("unrelated", config.unrelated, unrelated))
        for part, source, found in parts:
            digest = dataset.fingerprint(found)
            tracker.params({f"data.{part}_rows": len(found), f"data.{part}_fingerprint": digest})
            tracker.dataset(f"{source.name}-{part}", digest, source.path, part, len(found))

        # What it will take, then what it takes.
        if config.tracking.plan:
            longest, evaluated = (max(map(len, tokens["input_ids"])) for tokens in (train_tokens, heldout_tokens))
            note(calibration.plan_run(config, resolved, longest, evaluated))
        memory = MemoryMonitor(resolved.device)

        def note_memory() -> None:
            # Where an earlier process did all the training, the peaks over all phases are not this one's.
            whole = "steady" in memory.peaks or not (tracker.resumed or config.training.resume_from_checkpoint)
            note({f"memory/{key}": value for key, value in memory.summary().items() if whole or "/" in key})
            note(calibration.ratio(metrics) if whole else {})

        at_the_end.callback(note_memory)  # after a failure too: of what ran out of memory it is asked first

        # Model and adapter, with the seed set before anything is drawn.
        set_seed(config.seed)
        peft_config = adapters.peft_config(config, model.skeleton(config.model))
        if peft_config is not None:
            tracker.json(peft_config.to_dict(), "peft_config.json")
            if targets := getattr(peft_config, "target_modules", None):
                tracker.params({"resolved.target_modules": targets if isinstance(targets, str) else sorted(targets)})
        with memory.phase("load"):
            base = model.load_model(config.model, config.quantization, resolved)
        used = places(base)
        tracker.params({"resolved.places": ", ".join(used)})
        if len(used) > 1:
            log.info("model.device_map=%s spreads the model over %s", config.model.device_map, ", ".join(used))
        base_parameters = adapters.count_parameters(base)[1]
        start, first_adapter = config.lora_start, output_dir / "first_adapter"
        with memory.phase("initialize" if start else "load"):
            found = lora_init.batches(
                train_tokens,
                config.lora_variant.init_rows if start in lora_init.FROM_ROWS else 0,
                1 if start == "corda" else config.training.per_device_train_batch_size,  # PEFT's CorDA takes one row
                config.training.max_length,
                tokenizer.pad_token_id,
            )
            lora_init.prepare(start, base, peft_config, found)
            adapted = adapters.attach(base, peft_config, resolved.adapter_dtype)
            lora_init.finish(start, adapted, found, lambda: model.load_unquantized(config.model))
            same_start = lora_init.remember(start, adapted, first_adapter)
        if config.training.packing and not evaluation.isolates_packed_rows(adapted):
            raise ConfigError(
                f"training.packing: {config.model.model_name_or_path} does not keep packed rows apart, so training "
                "would not be that of the single rows; use training.packing=false"
            )
        trainer = training.build(
            adapted,
            tokenizer,
            train_tokens,
            heldout_tokens,
            config,
            resolved,
            output_dir / "checkpoints",
            memory,
        )
        trainable, total = adapters.count_parameters(adapted)
        note({"trainable_parameters": trainable, "total_parameters": total, "trainable_share": trainable / total})

        def measure(moment: str) -> evaluation.Evaluation:
            log.info("evaluating %s training", moment)
            with memory.phase(f"evaluate_{moment}"), autocast(resolved):
                found = evaluation.evaluate(
                    trainer.model,
                    tokenizer,
                    heldout,
                    heldout_tokens,
                    config.evaluation,
                    batch_size=config.training.per_device_eval_batch_size,
                    unrelated=unrelated_tokens,
                    score=score,
                    label=f"{moment} training: ",
                    # A start that moved a part of the base says with its adapter what the base says.
                    on_unrelated=None if moment == "after" or moves_base(start) else adapters.base_alone(trainer.model),
                    generating=memory.phase(f"generate_{moment}"),
                )
            note({f"{moment}/{key}": value for key, value in found.metrics.items()})
            if tasks:
                log.info("lm-eval: %s", ", ".join(config.evaluation.lm_eval_tasks))
                batch_size = config.training.per_device_eval_batch_size
                with memory.phase(f"lm_eval_{moment}"), autocast(resolved):
                    scores, told = lm_eval.evaluate(trainer.model, tokenizer, tasks, config.evaluation, batch_size)
                note({f"{moment}/{key}": value for key, value in scores.items()})
                tracker.params({"data.lm_eval_fingerprint": lm_eval.fingerprint(told["items"])})
                tracker.json(told, f"evaluation/{moment}_lm_eval.json")
            for name, losses in (("losses", found.losses), ("unrelated_losses", found.unrelated)):
                if losses:
                    tracker.text("".join(json.dumps(row) + "\n" for row in losses), f"evaluation/{moment}_{name}.jsonl")
            return found

        before = measure("before") if config.evaluation.before else None
        set_seed(config.seed)
        log.info("training %s of %s parameters (%.3g%%)", f"{trainable:,}", f"{total:,}", 100 * trainable / total)
        checkpoint = training.checkpoint_to_resume(config, output_dir, tracker.resumed, same_start)
        if checkpoint:
            log.info("going on from %s", checkpoint)
        judge = None
        if pruning is not None:
            from qlora_exp.training.pruning import judge as pruning_judge

            judge = pruning_judge(pruning)
        with efficiency.EnergyMeter() as energy:
            note(training.train(trainer, tracker.metrics, checkpoint, judge))
        joules = None if checkpoint else energy.joules  # of a part of the steps only
        note(efficiency.of_training(metrics, memory.peaks, peak_flops, joules))

        # What stays, before anything else may fail.
        saved = output_dir / "model"
        with memory.phase("save"):
            trainer.save_model(str(saved))
            if first_adapter.is_dir():
                lora_init.save_difference(trainer.model, saved, first_adapter)
            asking = copy(tokenizer)  # the run's own goes on as it was measured with before
            if (template := prompts.chat_template(config.dataset, tokenizer)) is not None:
                asking.chat_template = template  # whoever asks the model asks as it was trained
            asking.save_pretrained(saved)
        adapters.make_portable(saved, config.model.model_name_or_path)
        shutil.copy(output_dir / CONFIG_FILE, saved)
        if peft_config is not None:
            version = run_key.model(config.model.model_name_or_path, config.model.revision)
            (saved / run_key.BASE_FILE).write_text(json.dumps({"version": version}) + "\n", "utf-8")
        sizes = {"model_bytes": size_on_disk(saved)}
        if peft_config is not None:  # computed: merging itself would cost the memory of another model
            sizes["merged_model_bytes_computed"] = base_parameters * getattr(torch, resolved.dtype).itemsize
        if kept := checkpoints(output_dir / "checkpoints"):
            sizes["checkpoint_bytes"] = size_on_disk(kept[-1])
        note(sizes)

        def log_model() -> None:
            """With the measures after training, as far as they came."""
            keep = config.tracking.log_adapter if peft_config is not None else config.tracking.log_full_model
            if keep:
                settings = {**config.method.settings, **config.lora_variant.settings}
                settings |= {
                    "model_name_or_path": config.model.model_name_or_path,
                    "quantization": config.quantization.name,
                }
                tracker.model(saved.name, tracking.run_name(config), settings, trainer.state.global_step)

        try:
            after = measure("after")
            if before and unrelated_tokens is not None:
                note({"forgetting": after.metrics["unrelated_loss"] - before.metrics["unrelated_loss"]})
            if after.samples:
                columns = {key: [sample[key] for sample in after.samples] for key in ("prompt", "reference")}
                if before:
                    columns["before"] = [sample["answer"] for sample in before.samples]
                tracker.table(columns | {"after": [sample["answer"] for sample in after.samples]}, "samples.json")
                answers = {"before": before.samples if before else [], "after": after.samples}
                tracker.json(answers, "evaluation/answers.json")
        except Exception:
            log.warning("the evaluation after training failed; what was trained is in %s", saved)
            log_model()
            raise
        shutil.rmtree(first_adapter, ignore_errors=True)  # a run that is cut off before here goes on with it
        log_model()
        note_memory()
        tracker.describe(summary.markdown(metrics))
        return RunResult(tracker.run_id, output_dir, metrics)


def _writable(folder: str | Path) -> Path:
    path = Path(folder).resolve()
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / ".writable"
        probe.write_bytes(bytes(1024))
        probe.unlink()
    except OSError as error:
        raise ConfigError(
            f"cannot write to the output folder {path}: {error.strerror}; choose another: hydra.run.dir=FOLDER"
        ) from error
    return path


@contextmanager
def _logging_to(file: Path) -> Iterator[None]:
    """Everything that is logged inside goes to `file` too, without secrets."""
    handler = logging.FileHandler(file, encoding="utf-8")
    handler.setFormatter(RedactingFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.addHandler(handler)
    logging.getLogger("qlora_exp").setLevel(logging.INFO)
    try:
        yield
    finally:
        root.removeHandler(handler)
        handler.close()
