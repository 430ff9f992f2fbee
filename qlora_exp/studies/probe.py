"""Test a method on a tiny model: whether it trains on each kind of base, and which trainer features work with it.

`nox -s compatibility` writes the results to `compatibility.json`. `qlora-exp probe` runs the same tests with the
installed versions of the libraries. This module does not use MLflow.
"""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import Dataset
from peft import PeftModel
from torch.nn.functional import cosine_similarity
from transformers import set_seed

from qlora_exp.config.conf_folder import conf_dir
from qlora_exp.config.hydra_compose import compose, options
from qlora_exp.config.schema import Config
from qlora_exp.config.sections.method import MethodConfig
from qlora_exp.config.tables import compatibility, peft_methods
from qlora_exp.config.tables.compatibility import ASPECTS, BASES, WORKS
from qlora_exp.config.tables.peft_methods import moves_base_weights
from qlora_exp.data.tokenization import IGNORED
from qlora_exp.environment.device import Device, Resolved, resolve
from qlora_exp.environment.memory import MemoryMonitor
from qlora_exp.libraries.transformers import load_best_checkpoint
from qlora_exp.models import adapters, lora_init, quantization
from qlora_exp.models import base as model
from qlora_exp.models.checks import check_adapter
from qlora_exp.models.layers.experts import packed_experts
from qlora_exp.models.trained import freeze
from qlora_exp.training import trainer as training
from qlora_exp.training.checkpoints import checkpoints
from qlora_exp.utils.errors import ConfigError, type_and_first_line

_CPU = Device("cpu", "CPU", bf16=False, paging=False)
_NEEDED = {
    "method=trainable_tokens": ["method.token_indices=[41,42]"],
    "method=freeze": ["method.trainable_layers=1"],  # of two
    "method=lisa": ["method.lisa_activated_layers=1", "method.lisa_interval_steps=2"],
}
_LENGTHS = (12, 17, 9, 14, 20, 11, 16, 13)
_STEPS = 4


class FailedError(Exception):
    """Failure of a test; the message says briefly what does not work."""


def verdicts(words: Sequence[str], base: str, aspects: Sequence[str] = ASPECTS) -> dict[str, str]:
    """Test a method on one kind of base. If it does not train, the other aspects are not tested.

    Args:
        words: overrides that select the method, e.g. `["method=lora", "lora_variant=dora"]`.
        base: one of BASES.
        aspects: which of ASPECTS to test.

    Returns:
        For each tested aspect `works`, or the reason why it does not.
    """
    results: dict[str, str] = {}
    for aspect in aspects:
        if results.get("trains", WORKS) != WORKS:
            break
        torch.manual_seed(0)
        try:
            with compatibility.ignored():
                _TRIALS[aspect](_Trial(words, base))
            results[aspect] = WORKS
        except FailedError as error:
            results[aspect] = str(error)
        except Exception as error:  # any error that a library raises is a result
            results[aspect] = type_and_first_line(error, 120)
    return results


_CLEAR = "ConfigError: PEFT cannot adapt this model"
"""What begins the error of a method that looks at the values of weights before it refuses them."""


def family_verdict(words: Sequence[str], family: str) -> str:
    """Test whether a method trains a tiny model of a family.

    Args:
        words: overrides that select the method.
        family: one of `models.builtin.TINY`.

    Returns:
        `works`, or the reason why it does not. The reason starts with `compatibility.REFUSED` if a run is refused
        without knowing this verdict.
    """
    words = [*words, f"model.model_name_or_path=random:{family}"]
    base = "4bit" if "lora_variant=loftq" in words else "plain"
    verdict = verdicts(words, base, ["trains"])["trains"]
    if verdict == WORKS:
        return WORKS
    config = _Trial(words, base).config()
    if compatibility.family_refusal(compatibility.kind_of(config.method.kind, config.lora_variant.name), family):
        return verdict  # it is refused because of an earlier verdict
    try:
        check_adapter(config, model.skeleton(config.model))
    except ConfigError as error:
        _, _, why = str(error).partition(f"{config.model.model_name_or_path}: ")
        return compatibility.REFUSED + (why or str(error))
    if verdict.startswith(_CLEAR):  # a run says so, too, and often for sizes that only a tiny model has
        return compatibility.REFUSED + verdict.removeprefix("ConfigError: ")
    return verdict


def trial_config(words: Sequence[str], base: str, *more: str) -> Config:
    """Compose the config of a test, without dropout, whose random numbers depend on how often it is called.

    Args:
        words: overrides that select the method.
        base: one of BASES.
        more: additional overrides.
    """
    stored = ["method.quantized_base=null", *f"quantization={BASES[base]}".split()]
    words = [*words, *_NEEDED.get(words[0], []), *stored]
    config = compose(["device=cpu", "model=tiny_llama", *words, "training.learning_rate=1e-2", *more])
    possible = peft_methods.settings(config.method.peft_type) if config.method.peft_type else {}
    still = {name: 0.0 for name in possible if name.endswith("dropout")}  # ShadowPEFT's own default is not 0
    return config.model_copy(update={"method": config.method.model_copy(update=still)})


class _Trial:
    """One method on one kind of base, with functions that build its models, rows and trainers."""

    def __init__(self, words: Sequence[str], base: str) -> None:
        self.method, self.base = words, base
        self.quantized = base != "plain"
        ids = [[40 + (7 * row + place) % 60 for place in range(length)] for row, length in enumerate(_LENGTHS)]
        self.rows = Dataset.from_dict({"input_ids": ids, "labels": [[IGNORED, *row[1:]] for row in ids]})

    def config(self, *more: str) -> Config:
        """Compose the config."""
        return trial_config(self.method, self.base, *more)

    def begin(self, *more: str, values_of: Any = None) -> tuple[Config, Resolved, Any]:
        """Build the adapted model, the same at each call.

        Args:
            more: additional overrides.
            values_of: a model whose weights replace those of the unquantized base.
        """
        config = self.config(*more)
        resolved = resolve(config, _CPU)
        set_seed(1)
        base = model.load_model(config.model, config.quantization, resolved)
        if values_of is not None:
            for name, layer in values_of.named_modules():
                if (weight := quantization.weight_of(layer)) is not None:
                    same = base.get_submodule(name)
                    same.weight.data = weight.T if type(same).__name__ == "Conv1D" else weight
            for name, experts in packed_experts(values_of):
                base.get_parameter(name).data = experts.dense()
        settings = adapters.peft_config(config, model.skeleton(config.model))
        batches = lora_init.batches(self.rows, 8, 1 if config.lora_start == "corda" else 8, 64, 0)
        lora_init.prepare(config.lora_start, base, settings, batches)
        adapted = adapters.attach(base, settings, resolved.adapter_dtype)
        freeze(adapted, config.method)
        lora_init.finish(config.lora_start, adapted, batches, lambda: model.load_unquantized(config.model))
        return config, resolved, adapted

    def perturbed(self, **options: Any) -> Any:
        """Build an adapted model with perturbed parameters: at their initialization many methods have no effect."""
        _, _, adapted = self.begin(**options)
        torch.manual_seed(2)
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data += 0.05 * torch.randn_like(parameter)
        return adapted

    def train(self, folder: Path, *more: str, checkpoint: Path | None = None) -> tuple[Any, list[float]]:
        """Train; return the trainer and its losses."""
        steps = [f"training.max_steps={_STEPS}", "training.per_device_train_batch_size=2"]
        config, resolved, adapted = self.begin(*steps, *more)
        tokenizer = model.load_tokenizer(config.model)
        trainer = training.build(
            adapted, tokenizer, self.rows, self.rows.select(range(4)), config, resolved, folder, MemoryMonitor()
        )
        losses: list[float] = []
        set_seed(3)
        training.train(
            trainer,
            lambda curves, _: losses.append(curves["train/loss"]) if "train/loss" in curves else None,
            checkpoint,
        )
        return trainer, losses


def _logits(adapted: Any, ids: torch.Tensor, **inputs: Any) -> torch.Tensor:
    """Return the logits of one row, without tokens that a method prepends: (tokens, vocabulary)."""
    adapted.eval()
    with torch.no_grad():
        mask = {} if inputs else {"attention_mask": torch.ones_like(ids)}
        return adapted(input_ids=ids, **mask, **inputs).logits[0, -ids.shape[1] :]


def _trains(trial: _Trial) -> None:
    """Check that only what the method adds changes, along the right gradients, and that all of it is saved."""
    if trial.quantized:
        _check_gradients(trial)
    ids = torch.tensor(trial.rows[0]["input_ids"])[None]
    with tempfile.TemporaryDirectory() as folder:
        _, _, adapted = trial.begin()
        before = {name: quantization.dense(p.detach()).clone() for name, p in adapted.named_parameters()}
        trainer, _ = trial.train(Path(folder))
        after = dict(trainer.model.named_parameters())
        changed = {name for name, p in after.items() if not torch.equal(quantization.dense(p.detach()), before[name])}
        allowed = {name for name, p in after.items() if p.requires_grad}
        if not changed or changed - allowed:
            raise FailedError(
                f"{len(changed)} of {len(allowed)} trained tensors change, {len(changed - allowed)} others"
            )
        if isinstance(trainer.model, PeftModel):
            config = trial.config()
            if moves_base_weights(config.lora_start):
                lora_init.remember(config.lora_start, adapted, Path(folder) / "first")
                lora_init.save_difference(trainer.model, Path(folder) / "saved", Path(folder) / "first")
            else:
                trainer.model.save_pretrained(f"{folder}/saved")
            base = model.load_model(config.model, config.quantization, resolve(config, _CPU))
            again = PeftModel.from_pretrained(base, f"{folder}/saved")
            _check_close("what is loaded is not what was saved", _logits(again, ids), _logits(trainer.model, ids))


def _check_gradients(trial: _Trial) -> None:
    """Check that gradients on a quantized base equal those on an unquantized base with the same values."""
    quantized = trial.perturbed()
    # LoftQ can only start on a quantized base, so it is dropped here. (QA-LoRA sums over groups only with GPTQ.)
    plain_trial = _Trial([word for word in trial.method if word != "lora_variant=loftq"], "plain")
    config = trial.config()
    values = model.load_model(config.model, config.quantization, resolve(config, _CPU))
    plain = plain_trial.perturbed(values_of=values)
    same = dict(plain.named_parameters())
    for name, parameter in quantized.named_parameters():
        if parameter.requires_grad:
            same[name].data.copy_(parameter.data)
    actual, expected = (_gradients(adapted, trial.rows) for adapted in (quantized, plain))
    if actual.keys() != expected.keys():
        raise FailedError("gradients are missing")
    cosines = [
        cosine_similarity(actual[name].flatten(), gradient.flatten(), dim=0).item()
        for name, gradient in expected.items()
        if gradient.norm() > 1e-9
    ]
    if not cosines or min(cosines) < 0.999:
        raise FailedError(f"gradients are not those of the base's values (cosine {min(cosines, default=0):.2f})")


def _gradients(adapted: Any, rows: Dataset) -> dict[str, torch.Tensor]:
    adapted.train()
    torch.manual_seed(1)
    ids = torch.tensor(rows[0]["input_ids"])[None]
    adapted(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss.backward()
    return {name: p.grad for name, p in adapted.named_parameters() if p.requires_grad and p.grad is not None}


def _check_close(what: str, actual: torch.Tensor, expected: torch.Tensor) -> None:
    worst = (actual - expected).abs().max().item()
    if not worst <= 1e-3 * max(1.0, expected.abs().max().item()):
        raise FailedError(f"{what} (logits differ by {worst:.2g})")


def _check_same_losses(what: str, actual: list[float], expected: list[float]) -> None:
    if len(actual) != len(expected) or any(abs(a - b) > 1e-3 for a, b in zip(actual, expected, strict=False)):
        shown = [" ".join(f"{loss:.3f}" for loss in losses) for losses in (actual, expected)]
        raise FailedError(f"{what} (losses {shown[0]}, not {shown[1]})")


def _checkpoints_gradients(trial: _Trial) -> None:
    with tempfile.TemporaryDirectory() as folder:
        plain, recomputed = (
            trial.train(Path(folder), f"training.gradient_checkpointing={on}")[1] for on in ("false", "true")
        )
    _check_same_losses("training is another with activations recomputed", recomputed, plain)


def _packs(trial: _Trial) -> None:
    """Check that rows packed into one sequence, separated by their positions, give the same logits as separate rows."""
    adapted = trial.perturbed()
    rows = [torch.tensor(row)[None] for row in trial.rows["input_ids"][:3]]
    positions = torch.cat([torch.arange(row.shape[1]) for row in rows])[None]
    packed = _logits(adapted, torch.cat(rows, dim=1), position_ids=positions, use_cache=False)
    separate = torch.cat([_logits(adapted, row) for row in rows])
    _check_close("packed rows are not computed as they are apart", packed, separate)


def _keeps_best(trial: _Trial) -> None:
    """Check that a checkpoint loaded at the end gives the same held-out loss as when it was saved."""
    each_step = ["training.eval_strategy=steps", "training.eval_steps=1", "training.save_strategy=steps"]
    each_step += ["training.save_steps=1", "training.save_total_limit=null"]
    with tempfile.TemporaryDirectory() as folder:
        trainer, _ = trial.train(Path(folder), *each_step)
        losses = {line["step"]: line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line}
        for step in range(1, _STEPS):  # any of them may be the best
            trainer.state.best_model_checkpoint = f"{folder}/checkpoint-{step}"
            load_best_checkpoint(trainer)
            now = trainer.evaluate()["eval_loss"]
            if abs(now - losses[step]) > 1e-3:
                raise FailedError(f"a checkpoint put back is another model (loss {now:.3f}, not {losses[step]:.3f})")


def _resumes(trial: _Trial) -> None:
    saving = ["training.save_strategy=steps", "training.save_steps=2"]
    with tempfile.TemporaryDirectory() as folder:
        _, uninterrupted = trial.train(Path(folder), *saving)
        _, rest = trial.train(Path(folder) / "again", *saving, checkpoint=checkpoints(Path(folder))[0])
    _check_same_losses("a resumed run is not the uninterrupted one", rest, uninterrupted[2:])


def _merges(trial: _Trial) -> None:
    """Check that the model gives the same logits after the adapter's weights are merged into the base."""
    adapted = trial.perturbed()
    ids = torch.tensor(trial.rows[0]["input_ids"])[None]
    expected = _logits(adapted, ids)
    if not isinstance(adapted, PeftModel):
        return  # a full fine-tune has no adapter to merge
    if adapted.active_peft_config.is_prompt_learning or not hasattr(adapted.base_model, "merge_and_unload"):
        raise FailedError("has no weights that could be merged into the base's")
    merged = adapted.merge_and_unload()
    _check_close("merged it is another model", _logits(merged, ids), expected)


_TRIALS: dict[str, Callable[[_Trial], None]] = {
    "trains": _trains,
    "gradient_checkpointing": _checkpoints_gradients,
    "packing": _packs,
    "load_best_model_at_end": _keeps_best,
    "resume": _resumes,
    "merge": _merges,
}


def kinds() -> dict[str, tuple[str, ...]]:
    """List the kinds of methods with a file in `conf/`, each with the overrides that select it.

    Methods of the same PEFT type count as one kind.
    """
    by_kind: dict[str, tuple[str, ...]] = {}
    for method in sorted({*options("method")} - {"qlora"}):
        settings = yaml.safe_load((conf_dir() / "method" / f"{method}.yaml").read_text("utf-8"))["method"]
        by_kind[MethodConfig.model_validate(settings).kind] = (f"method={method}",)
    for variant in sorted({*options("lora_variant")} - {"lora"}):
        by_kind[f"LORA+{variant}"] = ("method=lora", f"lora_variant={variant}")
    return by_kind


def name_of(words: tuple[str, ...]) -> str:
    """Return the name of a kind from the overrides that select it: `ia3`, `lora dora`."""
    return " ".join(word.split("=")[1] for word in words)
