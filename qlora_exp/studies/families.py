"""Test what works with a family of models: complete runs of a tiny random one, from its rows to llama.cpp.

`nox -s families` writes the results to docs/reference/families.md.
"""

from collections.abc import Callable, Collection
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from qlora_exp.config.hydra_compose import compose
from qlora_exp.config.schema import Config
from qlora_exp.config.tables.compatibility import REFUSED, WORKS
from qlora_exp.config.tables.peft_methods import PRESETS
from qlora_exp.data.tokenization import IGNORED
from qlora_exp.deploy import llama_cpp
from qlora_exp.deploy.export import export
from qlora_exp.deploy.load import find, load
from qlora_exp.models.base import skeleton
from qlora_exp.models.files import GGUF_FILE
from qlora_exp.models.targets import resolve_targets
from qlora_exp.recipe.finetune import run
from qlora_exp.recipe.inputs import read_inputs
from qlora_exp.recipe.result import RunResult
from qlora_exp.recipe.tokens import tokenize
from qlora_exp.studies.probe import FailedError, verdicts
from qlora_exp.tracking.journal import metrics
from qlora_exp.utils.errors import ConfigError, UserError, type_and_first_line

METHODS = {"lora": "plain", "qlora": "4bit", "full": "plain"}
"""Methods, each with the kind of base that `studies.probe` has for it."""
_RUN = (
    "device=cpu",
    "model=tiny_llama",
    "dataset.max_train_rows=16",
    "dataset.max_eval_rows=4",
    "training.max_steps=4",
    "training.per_device_train_batch_size=2",
    "training.learning_rate=5e-3",
    "training.eval_strategy=steps",
    "training.eval_steps=4",
    "unrelated=none",
    "evaluation.generate_rows=2",
    "evaluation.max_new_tokens=4",
    "tracking.plan=false",
    "tracking.log_adapter=false",
)
_NEW = 4
"""Number of tokens to generate."""
_LLAMA_CPP = 5e-3
"""Greatest difference from llama.cpp, of the largest log probability: it takes GELU from a table of 16-bit values."""


def family_features(family: str, folder: Path, features: Collection[str] | None = None) -> dict[str, str]:
    """Test what works with a tiny random model of a family.

    Args:
        family: one of `models.builtin.TINY`.
        folder: folder for the runs and their MLflow store, which tests of other families may share.
        features: which of FEATURES to test; None: all.

    Returns:
        For each feature `works`, or the reason why it does not. The reason starts with `compatibility.REFUSED` if a
        user is told so in one line.
    """
    tested, results = _Family(family, folder), dict[str, str]()
    for feature in FEATURES if features is None else features:
        try:
            FEATURES[feature](tested)
            results[feature] = WORKS
        except UserError as error:
            results[feature] = REFUSED + str(error).replace(f"random:{family}", "the model").split("\n")[0]
        except FailedError as error:
            results[feature] = str(error)
        except Exception as error:  # any error that a library raises is a result
            results[feature] = type_and_first_line(error, 200)
    return results


class _Family:
    """Tiny random model of a family, and its runs, each done once."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder
        self.done: dict[str, RunResult | Exception] = {}

    def config(self, method: str, *more: str) -> Config:
        """Compose the config of a run."""
        no_dropout = [] if method == "full" else ["method.lora_dropout=0"]  # LoRA on experts has none
        store = f"tracking.uri=sqlite:///{self.folder}/mlflow.db"
        return compose(
            [*_RUN, f"method={method}", f"model.model_name_or_path=random:{self.name}", store, *no_dropout, *more]
        )

    def run(self, method: str, *more: str) -> RunResult:
        """Run a method from start to end; raise what it raised if it was tried before."""
        name = "-".join([self.name, method, *more]).replace("=", "_")
        if name not in self.done:
            try:
                self.done[name] = run(self.config(method, *more), self.folder / name)
            except Exception as error:  # raised again by each feature that needs this run
                self.done[name] = error
        result = self.done[name]
        if isinstance(result, Exception):
            raise result
        return result

    @property
    def taken(self) -> RunResult:
        """The run whose model is taken away: LoRA's; a full fine-tune's where LoRA is refused."""
        return self.run(self.method)

    @cached_property
    def method(self) -> str:
        """The method of `taken`."""
        try:
            self.run("lora")
        except UserError:
            return "full"
        return "lora"

    @cached_property
    def merged(self) -> Path:
        """The folder of the model without an adapter."""
        saved = find(str(self.taken.output_dir), device="cpu")
        if not saved.adapter:
            return saved.folder
        out = self.folder / f"{self.name}-merged"
        export(saved, out)
        return out


def _trains(method: str) -> Callable[[_Family], None]:
    def check(family: _Family) -> None:
        """Check that a run learns, and that gradients, frozen weights and saved weights are right."""
        measured = family.run(method).metrics
        if not measured["after/loss"] < measured["before/loss"]:
            raise FailedError(f"the loss does not fall ({measured['before/loss']:.4f} to {measured['after/loss']:.4f})")
        words = [f"method={method}", f"model.model_name_or_path=random:{family.name}"]
        if (verdict := verdicts(words, METHODS[method], ["trains"])["trains"]) != WORKS:
            raise FailedError(verdict)

    return check


def _checkpointing(family: _Family) -> None:
    """Check that losses are the same with activations recomputed."""
    again = family.run(family.method, "training.gradient_checkpointing=true").metrics["after/loss"]
    _check_equal("recomputing activations changes the training", again, family.taken.metrics["after/loss"])


def _packing(family: _Family) -> None:
    """Check that packed rows are computed as single rows are, if such a run is not refused."""
    family.run(family.method, "training.packing=true")
    words = [f"method={family.method}", f"model.model_name_or_path=random:{family.name}"]
    if (verdict := verdicts(words, "plain", ["packing"])["packing"]) != WORKS:
        raise FailedError(verdict)


def _evaluation(family: _Family) -> None:
    """Check that the held-out loss is that of the training, and that answers depend on nothing but their prompt."""
    curve = [line["eval/loss"] for line in metrics(family.taken.output_dir) if "eval/loss" in line]
    _check_equal("the held-out loss in training is another", curve[-1], family.taken.metrics["after/loss"])
    model, tokenizer = load(str(family.taken.output_dir), device="cpu")
    prompts = [tokenizer(text)["input_ids"] for text in ("Can I walk on it?", "No")]
    for prompt, (ids, logits) in zip(prompts, _generated(model, tokenizer, prompts), strict=True):
        alone_ids, alone = _generated(model, tokenizer, [prompt])[0]
        _check_close("answers depend on the other prompts of a batch", logits[0], alone[0])
        if ids != alone_ids:
            raise FailedError("answers depend on the other prompts of a batch")
        with torch.no_grad():
            whole = model(input_ids=torch.tensor([prompt + ids[:-1]]), use_cache=False).logits[0, len(prompt) - 1 :]
        _check_close("answers depend on the cache", alone, whole)


def _generated(model: Any, tokenizer: Any, prompts: list[list[int]]) -> list[tuple[list[int], torch.Tensor]]:
    """Return the greedy answer to each prompt of a batch: token ids, and logits, (tokens, vocabulary)."""
    batch = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
    made = model.generate(
        **{name: batch[name] for name in ("input_ids", "attention_mask")},
        max_new_tokens=_NEW,
        min_new_tokens=_NEW,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        pad_token_id=tokenizer.pad_token_id,
    )
    logits = torch.stack(made.logits, dim=1)
    return [(row[-_NEW:].tolist(), values) for row, values in zip(made.sequences, logits, strict=True)]


def _loads(family: _Family) -> None:
    """Check that what runs saved has the held-out loss that was measured after training."""
    for method in METHODS:
        try:
            result = family.run(method)
        except UserError:  # which another feature says
            continue
        model, _ = load(str(result.output_dir), device="cpu")
        config = family.config(method)
        nll, count = 0.0, 0
        for row in tokenize(config, read_inputs(config)).heldout:
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
            labels = torch.tensor(row["labels"][1:])
            nll += torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum").item()
            count += int((labels != IGNORED).sum())
        _check_equal(f"what {method} saved is another model", nll / count, result.metrics["after/loss"])


def _merges(family: _Family) -> None:
    """Check that the adapter can be merged; `export` compares the logits."""
    assert family.merged.is_dir()


def _converts(family: _Family) -> None:
    """Check that llama.cpp computes what transformers does, if the model can be written for it."""
    out = family.folder / f"{family.name}-gguf"
    export(find(str(family.merged), device="cpu"), out, form="gguf", type_="f32")
    model, tokenizer = load(str(family.merged), device="cpu")
    ids = tokenizer("Can I walk on wet concrete? No: wait for 24 hours.")["input_ids"]
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    server, largest, compared = llama_cpp.load(out / GGUF_FILE, 256, 1, exact=True), 0.0, 0
    for place in range(len(ids)):
        if found := llama_cpp.log_probabilities(server, ids[: place + 1], expected.shape[1]):
            theirs = torch.tensor([*found.values()])
            largest = max(largest, (theirs - expected[place, [*found]]).abs().max().item())
            compared += 1
    if compared < len(ids) / 2 or not largest <= _LLAMA_CPP * expected.abs().max().item():
        raise FailedError(f"llama.cpp computes another model (log probabilities differ by {largest:.2g})")


def _has_presets(family: _Family) -> None:
    """Check that each preset of target modules names layers of this family."""
    model, missing = skeleton(family.config("lora").model), []
    for preset in PRESETS:
        try:
            resolve_targets(preset, model)
        except ConfigError:
            missing.append(preset)
    if missing:
        raise ConfigError(f"no layers for {', '.join(missing)}; there are others, which can be named")


def _check_equal(what: str, actual: float, expected: float) -> None:
    if not abs(actual - expected) <= 1e-4 * abs(expected):
        raise FailedError(f"{what} ({actual:.5f}, not {expected:.5f})")


def _check_close(what: str, actual: torch.Tensor, expected: torch.Tensor) -> None:
    worst = (actual - expected).abs().max().item()
    if not worst <= 1e-3 * max(1.0, expected.abs().max().item()):
        raise FailedError(f"{what} (logits differ by {worst:.2g})")


FEATURES: dict[str, Callable[[_Family], None]] = {
    **{method: _trains(method) for method in METHODS},
    "gradient checkpointing": _checkpointing,
    "packing": _packing,
    "evaluation": _evaluation,
    "save and load": _loads,
    "merge": _merges,
    "GGUF": _converts,
    "presets": _has_presets,
}
"""Tested features, each with a function that raises where it does not work."""
