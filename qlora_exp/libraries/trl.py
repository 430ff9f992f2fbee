"""TRL's private parts. Checked on TRL 1.16.0."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from trl.kernels import chunked_logprob
from trl.trainer import utils

from qlora_exp.libraries.patching import patched


def score_supervised_tokens_only() -> None:
    """Make TRL's LM head skip tokens without loss on a CPU too, as it does on a GPU: the same loss, sooner.

    Elsewhere TRL scores every token, because the varying number of supervised ones would make a compiling backend
    compile again at each batch; eager CPU kernels do not mind. Replaces `trl.trainer.utils._use_triton`, for good:
    there is no public switch.
    """
    vars(utils)["_use_triton"] = lambda device: device.type in ("cuda", "xpu", "cpu")


@contextmanager
def every_token_scored() -> Iterator[None]:
    """Inside, TRL's LM head scores every token (`trl.trainer.utils._use_triton`): fake tensors say not which count."""
    with patched(utils, _use_triton=lambda device: False):
        yield


@contextmanager
def loss_as_on_gpu() -> Iterator[None]:
    """Inside, TRL's loss allocates on the CPU what its GPU kernels allocate.

    These work in place, and add products of 16 bits to a float32 sum. Replaces `_forward_tile`, `_backward_tile` and
    `_addmm_fp32` of `trl.kernels.chunked_logprob`, so that the loss has no values: for fake tensors only.
    """

    def added(sum_: Any, a: Any, b: Any) -> None:
        if a.dtype == torch.float32:
            sum_.addmm_(a, b)
        else:
            torch.addmm(sum_, a, b, out_dtype=torch.float32, out=sum_)

    def nothing(*_: Any, **__: Any) -> None:
        pass

    with patched(chunked_logprob, _forward_tile=nothing, _backward_tile=nothing, _addmm_fp32=added):
        yield


def set_trained_tokens(trainer: Any, tokens: int) -> None:
    """Say how many tokens were trained on before a resume (`SFTTrainer._total_train_tokens`): TRL starts at zero."""
    trainer._total_train_tokens = tokens
