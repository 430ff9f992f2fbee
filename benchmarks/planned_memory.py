"""Compare predicted with measured tensor memory of real runs of the built-in model on this CPU.

    nox -s memory -- planned_memory [METHOD ...]        # a few minutes on 2 cores

Memory is measured by torch's profiler, which records every allocation of a tensor. Rows have `max_length` tokens.
"""

import argparse
import gc
import json
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import torch
from datasets import Dataset

from qlora_exp.config.hydra_compose import compose
from qlora_exp.config.schema import Config
from qlora_exp.environment.device import detect, resolve
from qlora_exp.environment.memory import MemoryMonitor
from qlora_exp.models import adapters
from qlora_exp.models import base as model
from qlora_exp.models.trained import freeze
from qlora_exp.planning import planner
from qlora_exp.training import trainer as training
from qlora_exp.utils.quiet import quiet
from qlora_exp.utils.units import MIB

LENGTH = 128
METHODS = {
    "full": ["method=full"],
    "lora": ["method=lora"],
    "qlora": ["method=qlora"],
    "dora": ["method=lora", "lora_variant=dora"],
    "freeze": ["method=freeze", "method.trainable_layers=4"],
    "freeze_by_name": ["method=freeze", "method.trainable_layers=null", "method.unfrozen_parameters=[mlp.up_proj]"],
    "lisa": ["method=lisa", "method.lisa_interval_steps=1"],
    "muon": ["method=full", "optimizer=muon"],
}
"""Runs by name, with the words that choose them."""
PACKAGED = {
    name: ["method=full", f"optimizer={name}"]
    for name in ("adamw_torch_8bit", "galore_adamw", "apollo_adamw", "schedule_free_adamw", "stable_adamw", "adam_mini")
}
"""Runs with optimizers that need extra packages."""


def measured(config: Config) -> float:
    """Return the peak tensor memory of two steps, in MiB."""
    gc.collect()  # what the run before left must not be freed while this one is measured
    resolved = resolve(config, detect("cpu"))
    tokenizer = model.load_tokenizer(config.model)
    base = model.load_model(config.model, config.quantization, resolved)
    adapted = adapters.attach(base, adapters.peft_config(config, base), resolved.adapter_dtype)
    freeze(adapted, config.method)
    # Rows alternate between two lengths, so that each batch has some padding, as most real batches have.
    ids = [[40 + (7 * row + place) % 900 for place in range(LENGTH - row % 2)] for row in range(16)]
    before = sum(_nbytes(layer) for layer in {id(layer): layer for layer in adapted.modules()}.values())
    before -= _tied(base)
    rows = Dataset.from_dict({"input_ids": ids, "labels": ids})
    with tempfile.TemporaryDirectory() as folder:
        trainer = training.build(adapted, tokenizer, rows, rows, config, resolved, Path(folder), MemoryMonitor())
        trace = Path(folder) / "trace.json"
        with torch.profiler.profile(profile_memory=True) as profiler:
            training.train(trainer, lambda *_: None, None)
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text("utf-8"))["traceEvents"]
    now = most = 0
    for event in events:
        if event.get("name") == "[memory]":
            now += event["args"]["Bytes"]
            most = max(most, now)
    return (most + before) / MIB


def _tied(base: Any) -> int:
    """Return the bytes of the output layer if it shares its weight with the embedding, else 0."""
    head, embedding = base.get_output_embeddings().weight, base.get_input_embeddings().weight
    nbytes: int = head.nbytes
    return nbytes if head is embedding else 0


def _nbytes(layer: torch.nn.Module) -> int:
    """Return the bytes of a layer's own parameters, and of the quantization constants of a 4-bit layer."""
    nbytes = sum(parameter.nbytes for parameter in layer.parameters(recurse=False))
    if (state := getattr(getattr(layer, "weight", None), "quant_state", None)) is not None:
        nbytes += state.absmax.nbytes + (state.state2.absmax.nbytes if state.nested else 0)
    return nbytes


def main() -> None:
    """Predict and measure each run, and print the errors."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "methods", nargs="*", metavar="RUN", help=f"runs; default: {', '.join(METHODS)}; others: {', '.join(PACKAGED)}"
    )
    parser.add_argument("--model", default="smollm2_135m", help="option of the config group `model`")
    parser.add_argument("--batches", type=int, nargs="+", default=[2, 4], help="batch sizes")
    options = parser.parse_args()
    quiet()
    errors = []
    print(f"{'run':28} {'predicted':>9} {'measured':>9} {'error':>7}  MiB")
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:  # one without the planner's tensors
        for name, words in {**METHODS, **PACKAGED}.items():
            for checkpointing in (False, True):
                for batch in options.batches:
                    label = f"{name} batch {batch}{' checkpointing' if checkpointing else ''}"
                    if name not in (options.methods or METHODS):
                        continue
                    config = compose(
                        [
                            *words, f"model={options.model}", "device=cpu",
                            f"training.max_length={LENGTH}", "training.max_steps=2",
                            f"training.per_device_train_batch_size={batch}", "training.eval_strategy=no",
                            f"training.gradient_checkpointing={str(checkpointing).lower()}",
                            "training.train_sampling_strategy=sequential", "training.save_strategy=no",
                        ]
                    )  # fmt: skip
                    phases = planner.Planner(config, resolve(config, detect("cpu"))).predict().phases
                    predicted = max(phases[phase].allocated for phase in ("first_step", "steady")) / MIB
                    actual = pool.submit(measured, config).result()
                    errors.append(abs(predicted / actual - 1))
                    print(f"{label:28} {predicted:9.0f} {actual:9.0f} {predicted / actual - 1:+7.1%}", flush=True)
    print(f"{len(errors)} runs: median error {median(errors):.1%}, worst {max(errors):.1%}")


if __name__ == "__main__":
    main()
