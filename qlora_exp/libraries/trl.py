"""Wrap TRL's private parts. Checked on TRL 1.16.0."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from trl.kernels import chunked_logprob
from trl.trainer import utils

from qlora_exp.libraries.patching import patched


def score_supervised_tokens_only() -> None:
    """Make TRL's LM head skip tokens without loss on a CPU too, as on a GPU: the same loss in less time.

    On other devices TRL scores every token, because the number of supervised tokens varies, and a compiling backend
    would compile again at each batch. Eager CPU kernels do not have this problem. Replaces
    `trl.trainer.utils._use_triton` permanently: there is no public switch.
    """
    vars(utils)["_use_triton"] = lambda device: device.type in ("cuda", "xpu", "cpu")


@contextmanager
def every_token_scored() -> Iterator[None]:
    """Make TRL's LM head score every token within the context: fake tensors have no values that mark supervised ones.

    Replaces `trl.trainer.utils._use_triton`.
    """
    with patched(utils, _use_triton=lambda device: False):
        yield


@contextmanager
def loss_as_on_gpu() -> Iterator[None]:
    """Make TRL's loss allocate on the CPU what its GPU kernels allocate, within the context; for fake tensors only.

    The GPU kernels work in place, and add 16-bit products to a float32 sum. Replaces `_forward_tile`, `_backward_tile`
    and `_addmm_fp32` of `trl.kernels.chunked_logprob`, so that the loss is never computed.
    """

    def add_product(sum_: Any, a: Any, b: Any) -> None:
        if a.dtype == torch.float32:
            sum_.addmm_(a, b)
        else:  # into a part of the sum's own memory: torch 2.11 has no such sum for fake tensors
            torch.mm(a, b, out=sum_.view(a.dtype)[:, : sum_.shape[1]])

    def do_nothing(*_: Any, **__: Any) -> None:
        pass

    with patched(chunked_logprob, _forward_tile=do_nothing, _backward_tile=do_nothing, _addmm_fp32=add_product):
        yield


def offload_one_at_a_time(trainer: Any) -> None:
    """Let a tensor leave the GPU before the next one does, in the place of five at once.

    Of checkpointed layers only their inputs leave, and there is the time of a layer between two of them. Sets
    `max_fwd_stash_size` of `SFTTrainer.maybe_activation_offload_context`, for which SFTConfig has no argument.
    """
    trainer.maybe_activation_offload_context.max_fwd_stash_size = 1


def set_trained_tokens(trainer: Any, tokens: int) -> None:
    """Set the number of tokens trained on before a resume (`SFTTrainer._total_train_tokens`): TRL starts at zero."""
    trainer._total_train_tokens = tokens


def name_experts(config: Any) -> None:
    """Give TRL's loss the number of experts under the name that it reads, `num_experts`.

    TRL's LM head (`trl.trainer.utils`) reads it from the config of every mixture of experts whose router has a loss;
    configs of GraniteMoE and PhiMoE call it `num_local_experts`. The property is added to the config's class, so that
    it is not saved.
    """
    if hasattr(config, "output_router_logits") and not hasattr(config, "num_experts"):
        type(config).num_experts = property(lambda self: self.num_local_experts)


def last_router_loss(trainer: Any) -> float:
    """Return the router's loss of the last batch, without its coefficient (`SFTTrainer._metrics`)."""
    losses: list[float] = trainer._metrics["train"]["aux_loss"]
    return losses[-1]
