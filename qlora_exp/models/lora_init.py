"""Where LoRA starts when its config alone does not say: from training rows, or from the base's own weights.

PEFT's functions do the work; what they need is brought here. Knows nothing of how a run trains.

A start that moves a part of the base into the adapter (PiSSA, OLoRA, CorDA, LoRA-GA) leaves a base that nobody else
has. So what is saved of such a run is its difference from that start: a plain LoRA of twice the rank, on the base as
it is published.
"""

import shutil
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel, initialize_lora_eva_weights
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.loraga import preprocess_loraga
from safetensors.torch import load_file
from transformers import PreTrainedModel
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from qlora_exp.config.peft_methods import moves_base
from qlora_exp.models.quantization import weight_of
from qlora_exp.utils.errors import ConfigError

Batch = dict[str, torch.Tensor]
_EVA_PASSES = 100
_WEIGHTS = "adapter_model.safetensors"
FROM_ROWS = ("corda", "eva", "lora_ga")
"""Starts that look at training rows."""


def batches(tokens: Dataset, rows: int, batch_size: int, max_length: int, pad_token_id: int) -> list[Batch]:
    """The first `rows` rows as a trainer would collate them.

    Returns:
        Batches of `input_ids`, `labels` and `attention_mask`, each (batch, length).
    """
    collate = DataCollatorForLanguageModeling(pad_token_id=pad_token_id)
    cut = [
        {"input_ids": row["input_ids"][:max_length], "labels": row["labels"][:max_length]}
        for row in tokens.select(range(min(rows, len(tokens))))
    ]
    return [collate(cut[start : start + batch_size]) for start in range(0, len(cut), batch_size)]


def prepare(start: str | None, base: PreTrainedModel, settings: Any, found: Iterable[Batch]) -> None:
    """What CorDA and LoRA-GA must know of the rows before the adapter is attached; for others nothing.

    CorDA (https://arxiv.org/abs/2406.05223) looks at covariances of each layer's inputs, LoRA-GA
    (https://arxiv.org/abs/2407.05000) at gradients of the base.

    Raises:
        ConfigError: PEFT cannot make anything of the rows or of the layers.
    """

    def go_through(learn: bool) -> None:
        for batch in found:
            loss = base(**{name: tensor.to(base.device) for name, tensor in batch.items()}).loss
            if learn:
                loss.backward()

    try:
        if start == "corda":
            preprocess_corda(base, settings, run_model=lambda: go_through(False))
        elif start == "lora_ga":
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Full backward hook is firing")  # it only counts
                preprocess_loraga(base, settings, train_step=lambda: go_through(True))
    except ValueError as error:
        raise ConfigError(f"init_lora_weights={start} cannot start so: {error}") from error


def finish(start: str | None, adapted: Any, found: list[Batch], unquantized: Callable[[], PreTrainedModel]) -> None:
    """Give the attached adapter the start that needs rows (EVA) or the base before it was quantized (LoftQ).

    EVA (https://arxiv.org/abs/2410.07170) also moves ranks to the layers whose inputs need them.

    Raises:
        ConfigError: the rows are too few for the rank.
    """
    if start == "eva":
        _look_along_inputs(adapted, found)
    elif start == "loftq":
        _make_up_for_quantization(adapted, unquantized())


def _look_along_inputs(adapted: PeftModel, found: list[Batch]) -> None:
    settings: Any = adapted.active_peft_config
    directions = round(settings.r * settings.eva_config.rho)
    enough = [batch for batch in found if _counted(batch, settings).sum() >= directions]
    if not enough:
        raise ConfigError(
            f"lora_variant=eva: no batch of the first training rows has the {directions} tokens that r={settings.r} "
            f"and eva_config.rho={settings.eva_config.rho} ask for: use larger batches, or a smaller r or rho"
        )
    left = iter(range(_EVA_PASSES * len(enough)))

    def forward(model: Any, batch: Batch) -> None:  # PEFT goes over the batches until its directions stay as they are
        if next(left, None) is None:
            raise ConfigError(
                f"lora_variant=eva: its directions still turn after {_EVA_PASSES} passes over {len(enough)} batches: "
                "use a larger lora_variant.init_rows, or a smaller r, eva_config.rho or eva_config.tau"
            )
        model(**batch)

    try:
        initialize_lora_eva_weights(
            adapted,
            enough,
            forward_fn=forward,
            prepare_model_inputs_fn=_counted,
            prepare_layer_inputs_fn=_inputs_at,
            show_progress_bar=False,
        )
    except ValueError as error:
        raise ConfigError(f"lora_variant=eva: {error}") from error


def _counted(batch: Batch, settings: Any) -> torch.Tensor:
    """Which positions EVA looks at, flat: those with loss, or all but padding."""
    if settings.eva_config.use_label_mask:
        return (batch["labels"] != settings.eva_config.label_mask_value).flatten()
    return batch["attention_mask"].bool().flatten()


def _inputs_at(inputs: Any, positions: torch.Tensor, _name: str) -> torch.Tensor:
    """A layer's inputs there: (positions, features). PEFT's own takes no layer whose input is flat, as OPT's are."""
    return inputs[0].reshape(-1, inputs[0].shape[-1])[positions]


@torch.no_grad()
def _make_up_for_quantization(adapted: PeftModel, original: PreTrainedModel) -> None:
    """LoftQ (https://arxiv.org/abs/2310.08659) with one iteration: B A is the best rank-r part of what is lost.

    PEFT 0.21's own `replace_lora_weights_loftq` needs a GPU, and is right for `lora_alpha == r` only.
    """
    adapter = adapted.active_adapter
    for name, layer in adapted.get_base_model().named_modules():
        kept = weight_of(layer.get_base_layer()) if isinstance(layer, LoraLayer) else None
        if kept is None:
            continue  # an output layer or an embedding has lost nothing
        source: Any = original.get_submodule(name)
        weight = source.weight.T if type(source).__name__ == "Conv1D" else source.weight
        lost = (weight.to(kept) - kept) / layer.scaling[adapter]
        u, s, v = torch.linalg.svd(lost, full_matrices=False)
        root, r = s.sqrt(), layer.r[adapter]
        for matrix, values in ((layer.lora_A, root[:r, None] * v[:r]), (layer.lora_B, u[:, :r] * root[:r])):
            parameter: Any = matrix[adapter].weight
            parameter.data.copy_(values)


def remember(start: str | None, adapted: Any, folder: Path) -> bool:
    """Keep the adapter as it starts in `folder`, if its start moved a part of the base into it.

    Returns:
        Whether a run that was cut off can go on: its base is the same again. On another device a start may be another.
    """
    earlier = load_file(folder / _WEIGHTS) if (folder / _WEIGHTS).is_file() else {}
    shutil.rmtree(folder, ignore_errors=True)  # of a run with another config, even
    if not moves_base(start):
        return True
    adapted.save_pretrained(str(folder))
    now = load_file(folder / _WEIGHTS)
    return not earlier or all(
        name in earlier and earlier[name].shape == one.shape and torch.allclose(earlier[name], one, 1e-3, 1e-5)
        for name, one in now.items()
    )


def save_difference(adapted: Any, folder: Path, remembered: Path) -> None:
    """Save into `folder` what was learned since `remembered` as a plain LoRA for the base as it is published.

    W + s (B A - B0 A0), with the start's B0 A0 taken out of the base: s [B, -B0] [A; A0], twice the rank
    (`PeftModel.save_pretrained`, `path_initial_model_for_weight_conversion`).
    """
    adapted.save_pretrained(str(folder), path_initial_model_for_weight_conversion=str(remembered))
