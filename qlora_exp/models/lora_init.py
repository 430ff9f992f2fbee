"""Initialize LoRA from training rows or from the base's own weights, where its config alone is not enough.

PEFT's functions do the work; this module gives them what they need. Does not depend on how a run trains.

Some initializations (PiSSA, OLoRA, CorDA, LoRA-GA) move a part of the base's weights into the adapter. The changed base
exists in this run only. So such a run saves the difference from its initialization: a plain LoRA of twice the rank, for
the base as published.
"""

import shutil
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset
from peft import PeftModel, initialize_lora_eva_weights
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.loraga import preprocess_loraga
from safetensors.torch import load_file
from transformers import PreTrainedModel
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from qlora_exp.config.tables.peft_methods import moves_base_weights
from qlora_exp.models.quantization import weight_of
from qlora_exp.utils.errors import ConfigError, first_line, is_out_of_memory

Batch = dict[str, torch.Tensor]
_EVA_PASSES = 100
_WEIGHTS = "adapter_model.safetensors"


def batches(tokens: Dataset, rows: int, batch_size: int, max_length: int, pad_token_id: int) -> list[Batch]:
    """Collate the first `rows` rows as a trainer would.

    Returns:
        Batches of `input_ids`, `labels` and `attention_mask`, each (batch, length).
    """
    collate = DataCollatorForLanguageModeling(pad_token_id=pad_token_id)
    truncated = [
        {"input_ids": row["input_ids"][:max_length], "labels": row["labels"][:max_length]}
        for row in tokens.select(range(min(rows, len(tokens))))
    ]
    return [collate(truncated[start : start + batch_size]) for start in range(0, len(truncated), batch_size)]


def prepare(start: str | None, base: PreTrainedModel, settings: Any, row_batches: Iterable[Batch]) -> None:
    """Collect what CorDA and LoRA-GA need from the rows before the adapter is attached; for others, do nothing.

    CorDA (https://arxiv.org/abs/2406.05223) uses covariances of each layer's inputs, LoRA-GA
    (https://arxiv.org/abs/2407.05000) gradients of the base.

    Raises:
        ConfigError: PEFT cannot use the rows or the layers.
    """

    def run_batches(backward: bool) -> None:
        for batch in row_batches:
            loss = base(**{name: tensor.to(base.device) for name, tensor in batch.items()}).loss
            if backward:
                loss.backward()

    try:
        if start == "corda":
            preprocess_corda(base, settings, run_model=lambda: run_batches(False))
        elif start == "lora_ga":
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Full backward hook is firing")  # it only counts
                preprocess_loraga(base, settings, train_step=lambda: run_batches(True))
    except (ValueError, RuntimeError) as error:  # torch raises the second for layers that hooks do not work on
        if is_out_of_memory(error):
            raise
        raise ConfigError(
            f"init_lora_weights={start} cannot be initialized from these rows and layers: {first_line(error)}"
        ) from error


def finish(
    start: str | None, adapted: Any, row_batches: list[Batch], unquantized: Callable[[], PreTrainedModel]
) -> None:
    """Initialize the attached adapter, where this needs rows (EVA) or the base before quantization (LoftQ).

    EVA (https://arxiv.org/abs/2410.07170) also moves ranks to the layers whose inputs need more of them.

    Raises:
        ConfigError: the rows are too few for the rank.
    """
    if start == "eva":
        _initialize_eva(adapted, row_batches)
    elif start == "loftq":
        _initialize_loftq(adapted, unquantized())


def _initialize_eva(adapted: PeftModel, row_batches: list[Batch]) -> None:
    settings: Any = adapted.active_peft_config
    directions = round(settings.r * settings.eva_config.rho)
    large_enough = [batch for batch in row_batches if _used_positions(batch, settings).sum() >= directions]
    if not large_enough:
        raise ConfigError(
            f"lora_variant=eva: no batch of the first training rows has the {directions} tokens that r={settings.r} "
            f"and eva_config.rho={settings.eva_config.rho} need; use larger batches, or a smaller r or rho"
        )
    remaining = iter(range(_EVA_PASSES * len(large_enough)))

    def forward(model: Any, batch: Batch) -> None:  # PEFT repeats the batches until its directions converge
        if next(remaining, None) is None:
            raise ConfigError(
                f"lora_variant=eva: its directions have not converged after {_EVA_PASSES} passes "
                f"over {len(large_enough)} batches; use a larger lora_variant.init_rows, or a smaller r, "
                "eva_config.rho or eva_config.tau"
            )
        model(**batch)

    try:
        initialize_lora_eva_weights(
            adapted,
            large_enough,
            forward_fn=forward,
            prepare_model_inputs_fn=_used_positions,
            prepare_layer_inputs_fn=_inputs_at,
            show_progress_bar=False,
        )
    except (ValueError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        raise ConfigError(f"lora_variant=eva: {first_line(error)}") from error


def _used_positions(batch: Batch, settings: Any) -> torch.Tensor:
    """Return a flat mask of the positions that EVA uses: those with loss, or all but padding."""
    if settings.eva_config.use_label_mask:
        return (batch["labels"] != settings.eva_config.label_mask_value).flatten()
    return batch["attention_mask"].bool().flatten()


def _inputs_at(inputs: Any, positions: torch.Tensor, _name: str) -> torch.Tensor:
    """Return a layer's inputs at these positions: (positions, features).

    PEFT's own function does not support layers whose input is flat, such as OPT's.
    """
    return inputs[0].reshape(-1, inputs[0].shape[-1])[positions]


@torch.no_grad()
def _initialize_loftq(adapted: PeftModel, original: PreTrainedModel) -> None:
    """Apply one iteration of LoftQ (https://arxiv.org/abs/2310.08659).

    B A becomes the best approximation of rank r to the quantization error. In a layer with fewer inputs or outputs than
    r, it is the whole error, and the other rows of A keep their random values. PEFT 0.21's own
    `replace_lora_weights_loftq` needs a GPU, and is correct for `lora_alpha == r` only.
    """
    adapter = adapted.active_adapter
    for name, layer in adapted.get_base_model().named_modules():
        dequantized = weight_of(layer.get_base_layer()) if isinstance(layer, LoraLayer) else None
        if dequantized is None:
            continue  # not quantized, as an output layer or an embedding: there is no error
        source: Any = original.get_submodule(name)
        weight = source.weight.T if type(source).__name__ == "Conv1D" else source.weight
        error = (weight.to(dequantized) - dequantized) / layer.scaling[adapter]
        u, s, v = torch.linalg.svd(error, full_matrices=False)
        root, most = s.sqrt(), min(layer.r[adapter], len(s))
        first, second = (cast(Any, matrix[adapter].weight).data for matrix in (layer.lora_A, layer.lora_B))
        first[:most] = root[:most, None] * v[:most]
        second.zero_()[:, :most] = u[:, :most] * root[:most]


def remember(start: str | None, adapted: Any, folder: Path) -> bool:
    """Save the initialized adapter in `folder`, if its initialization moved a part of the base into it.

    Returns:
        Whether an interrupted run can resume: its base is the same as before. On another device the same initialization
        may give other values.
    """
    earlier = load_file(folder / _WEIGHTS) if (folder / _WEIGHTS).is_file() else {}
    shutil.rmtree(folder, ignore_errors=True)  # it may even belong to a run with another config
    if not moves_base_weights(start):
        return True
    adapted.save_pretrained(str(folder))
    now = load_file(folder / _WEIGHTS)
    return not earlier or all(
        name in earlier and earlier[name].shape == value.shape and torch.allclose(earlier[name], value, 1e-3, 1e-5)
        for name, value in now.items()
    )


def save_difference(adapted: Any, folder: Path, remembered: Path) -> None:
    """Save into `folder` what was learned since the initialization, as a plain LoRA for the base as published.

    `remembered` is the folder of `remember`. W + s (B A - B0 A0), where the initialization's B0 A0 was taken out of the
    base, is a LoRA of twice the rank: s [B, -B0] [A; A0]
    (`PeftModel.save_pretrained`, `path_initial_model_for_weight_conversion`).
    """
    adapted.save_pretrained(str(folder), path_initial_model_for_weight_conversion=str(remembered))
