"""A model stored in 4 bits as GPTQ or AWQ choose them: so that what it computes on given rows changes least.

The only place that makes such files, with GPTQModel. Checked with GPTQModel 7.6.0 and GPTQ on a CPU; AWQ needs a GPU,
and was never run.
"""

import importlib.util
import io
import logging
import os
import tempfile
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch

from qlora_exp.config.schema import Config
from qlora_exp.data import dataset
from qlora_exp.utils.errors import ConfigError

log = logging.getLogger(__name__)

BITS = 4
ROWS = 128
"""Of the run's training rows; more change little (Frantar et al. 2022, https://arxiv.org/abs/2210.17323, take 128)."""
_SHORTEST = 10
_GROUPS = (128, 64, 32)


def check(form: str) -> None:
    """That files of this form can be made here.

    Raises:
        ConfigError: they cannot; what is missing.
    """
    if importlib.util.find_spec("gptqmodel") is None:
        raise ConfigError(f"--to {form} needs packages that `nox -s gptq` installs: GPTQModel and optimum")
    if form == "awq" and not torch.cuda.is_available():
        raise ConfigError("--to awq: GPTQModel makes AWQ files on a GPU only; --to gptq is made on a CPU too")


def rows(config: Config, tokenizer: Any) -> list[dict[str, list[int]]]:
    """What to calibrate with: the first training rows of the run, as it was given them.

    Raises:
        ConfigError: there are none of ten tokens and more.
        DataError: the rows are not here.
    """
    tokens = dataset.tokenize(dataset.load_rows(config.dataset).train, config, tokenizer)
    cut = [row["input_ids"][: config.training.max_length] for row in tokens.select(range(min(ROWS, len(tokens))))]
    if not (long := [ids for ids in cut if len(ids) >= _SHORTEST]):
        raise ConfigError(f"to calibrate takes rows of {_SHORTEST} tokens and more, and {config.dataset.path} has none")
    return [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in long]


def write(model: Any, tokenizer: Any, given: list[dict[str, list[int]]], folder: Path, form: str) -> str:
    """Write the model's files; what its weights are stored as.

    Args:
        model: on the CPU, unquantized.
        tokenizer: of the model.
        given: `rows`.
        folder: where to.
        form: gptq or awq.

    Raises:
        ConfigError: no group of weights that is known fits the model's layers.
    """
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", str(max(2, os.cpu_count() or 1)))  # 7.6 wants two
    from gptqmodel import GPTQModel, QuantizeConfig

    head = model.get_output_embeddings()
    layers = [one for one in model.modules() if isinstance(one, torch.nn.Linear) and one is not head]
    group = next((size for size in _GROUPS if all(one.in_features % size == 0 for one in layers)), None)
    if group is None:
        raise ConfigError(f"--to {form}: groups of {', '.join(map(str, _GROUPS))} weights do not fit its layers")
    how = {"quant_method": "awq", "format": "gemm"} if form == "awq" else {}
    log.info("%s: calibrating on %d rows, which takes minutes and more", form, len(given))
    # Its own log of each layer is hundreds of lines long.
    with tempfile.TemporaryDirectory(prefix=".merged.", dir=folder) as plain, redirect_stdout(io.StringIO()):
        model.save_pretrained(plain, max_shard_size="4GB")
        tokenizer.save_pretrained(plain)
        device = "cuda:0" if torch.cuda.is_available() else "cpu"
        made = GPTQModel.load(plain, QuantizeConfig(bits=BITS, group_size=group, **how), device=device)
        made.quantize(given, batch_size=1)
        made.save(str(folder))
    (folder / "quant_log.csv").unlink(missing_ok=True)
    return f"{form}, groups of {group}"
